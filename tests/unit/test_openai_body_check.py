"""Long request bodies: validated in a process first, with the errors of short ones, and limited in values."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.anthropic.schemas import CountTokensRequest, MessagesRequest
from tandem_frontend.openai.body_check import checker
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.body_check.limits import (
    INLINE_BYTES_MAX,
    INLINE_VALUES_MAX,
    PROMPT_IDS_MAX,
    VALUES_MAX,
    _count,
    check_values,
    is_inline,
)
from tandem_frontend.openai.common_params import Schema
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest

from tandem.errors import InvalidRequest, Overloaded, ServiceError
from tests.unit.support.examples import examples

ONE = b'{"role":"user","content":"a"}'


def chat_of(messages: int, one: bytes = ONE) -> bytes:
    return b'{"model":"m","messages":[' + b",".join([one] * messages) + b"]}"


@pytest_asyncio.fixture
async def bodies() -> AsyncIterator[BodyChecker]:
    made = BodyChecker(4_096, 0.75)
    yield made
    await made.close()


@settings(max_examples=examples(100), deadline=None)
@given(
    st.recursive(
        st.none() | st.text(max_size=3) | st.integers(-5, 5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
        max_leaves=40,
    )
)
def test_marks_bound_the_values_of_a_body(value: Any) -> None:
    data = json.dumps(value).encode()
    marks = data.count(b",") + data.count(b"{") + data.count(b"[")
    assert _count(value, 10**6) <= 1 + 3 * marks, "a member is two values, its mark one"


def test_only_bodies_that_parse_fast_are_inline() -> None:
    assert is_inline(chat_of(1))
    assert is_inline(chat_of(1, b'{"role":"user","content":"' + b"a " * 100_000 + b'"}'))
    assert not is_inline(chat_of(INLINE_VALUES_MAX))
    assert not is_inline(chat_of(1, b'{"role":"user","content":"' + b"a" * INLINE_BYTES_MAX + b'"}'))


def test_values_are_counted_and_token_ids_apart() -> None:
    check_values({"messages": [{"role": "user", "content": "a"}] * 2_048}, PROMPT_IDS_MAX)
    check_values({"prompt": [1] * PROMPT_IDS_MAX, "stop_token_ids": [1]}, PROMPT_IDS_MAX)
    check_values({"prompt": [[1] * 1_000] * 60}, PROMPT_IDS_MAX)
    check_values([1] * VALUES_MAX, PROMPT_IDS_MAX)
    for body, field in (
        ({"messages": [{"role": "user", "content": "a"}] * 8_000}, "body"),
        ({"chat_template_kwargs": {"a": [{}] * VALUES_MAX}}, "body"),
        ({"prompt": ["a"] * VALUES_MAX}, "body"),
        ({"prompt": [1] * (PROMPT_IDS_MAX + 1)}, "prompt"),
        ({"prompt": [[1] * 1_000] * 66}, "prompt"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check_values(body, PROMPT_IDS_MAX)
        assert refused.value.field == field


async def test_a_long_body_is_parsed_as_a_short_one(bodies: BodyChecker) -> None:
    assert len((await bodies.parse(ChatRequest, chat_of(1), "")).messages) == 1
    assert bodies.pid is None, "a short body needs no process"
    assert len((await bodies.parse(ChatRequest, chat_of(1_500), "")).messages) == 1_500
    ids = b'{"model":"m","prompt":[' + b",".join([b"1"] * 4_000) + b"]}"
    assert (await bodies.parse(CompletionRequest, ids, "")).prompt == [1] * 4_000


@pytest.mark.parametrize(
    ("data", "field", "problem"),
    [
        (chat_of(1_500, b"0"), "messages[0]", "must be an object"),
        (chat_of(34_000), "body", "JSON values"),
        (chat_of(1_500)[:-1], "body", "is not JSON"),
        (b'{"model":"m","messages":' + b"[" * 300_000, "body", "is not JSON"),
        (b'{"model":"m","messages":[' + ONE + b'],"metadata":{' + b",".join([b'"a":"b"'] * 3_000) + b',"\xff":1}}',
         "body", "is not JSON"),
    ],
)  # fmt: skip
async def test_an_error_of_a_long_body_names_its_field(
    bodies: BodyChecker, data: bytes, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refused:
        await bodies.parse(ChatRequest, data, "")
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")


async def test_a_process_that_dies_fails_one_body_only(bodies: BodyChecker) -> None:
    await bodies.parse(ChatRequest, chat_of(1_500), "")
    first = bodies.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    waiting = asyncio.ensure_future(bodies.parse(ChatRequest, chat_of(1_500), ""))
    await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(ServiceError, match="validates long request bodies"):
        await waiting
    await bodies.parse(ChatRequest, chat_of(1_500), "")
    assert bodies.pid != first


async def test_one_tenant_fills_a_share_of_the_queue_only(bodies: BodyChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "WAITING_MAX", 8)
    waiting = [asyncio.ensure_future(bodies.parse(ChatRequest, chat_of(1_500), "large")) for _ in range(8)]
    await asyncio.sleep(0)
    await bodies.parse(ChatRequest, chat_of(1_500), "small")
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert sum(isinstance(outcome, ChatRequest) for outcome in outcomes) == 6
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 2


async def test_close_ends_the_process_and_what_waits() -> None:
    bodies = BodyChecker(4_096, 1.0)
    await bodies.parse(ChatRequest, chat_of(1_500), "")
    pid = bodies.pid
    assert pid is not None
    waiting = [asyncio.ensure_future(bodies.parse(ChatRequest, chat_of(1_500), "")) for _ in range(3)]
    await asyncio.sleep(0)
    await bodies.close()
    await asyncio.gather(*waiting, return_exceptions=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        pytest.fail("the process is still there")


@pytest.mark.parametrize(
    ("schema", "body", "field"),
    [
        (ResponsesRequest, {"input": [{"role": "user", "content": "a"}] * 1_500 + [{"type": "x"}]}, "input[1500].type"),
        (
            MessagesRequest,
            {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}] * 1_500 + [{"role": "x", "content": "a"}]},
            "messages[1500].role",
        ),
        (CountTokensRequest, {"messages": [{"role": "user", "content": "a"}] * 1_500, "mood": 1}, "mood"),
    ],
)
async def test_long_bodies_of_the_other_doors_are_checked_too(
    bodies: BodyChecker, schema: type[Schema], body: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await bodies.parse(schema, json.dumps({"model": "m", **body}).encode(), "")
    assert bodies.pid is not None
    assert refused.value.field == field
