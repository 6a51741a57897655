"""Server-sent events: the fast form equals the library's, and failures are told where they can be read."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

import pytest
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.events import as_response, event_json, message_json, server_sent
from tandem_frontend.generation import Event
from tandem_frontend.http_errors import TYPE_BY_CODE

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import InvalidRequest, LegFailed
from tandem.rpc.status import ERROR_BY_REASON

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ACCEPTED = pb.GenerateAccepted(request_id="r")
CHUNK = pb.GenerateChunk(text="a\nb", token_ids=[1])


@given(st.integers(0, 2**31 - 1), TEXT, st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_the_fast_form_is_the_librarys(index: int, text: str, token_ids: list[int]) -> None:
    chunk = pb.GenerateChunk(index=index, text=text, token_ids=token_ids)
    line = event_json(chunk)
    assert json.loads(line) == json.loads(message_json(chunk))
    assert not {"\n", "\r"} & set(line)
    assert Parse(line, pb.GenerateResponse()) == as_response(chunk)


def test_logprobs_are_not_forgotten() -> None:
    chunk = pb.GenerateChunk(token_ids=[1], logprobs=[{"token_id": 1, "logprob": -1.5}])
    assert json.loads(event_json(chunk))["chunk"]["logprobs"][0]["logprob"] == -1.5


async def stream(*events: Event, failure: Exception | None = None) -> AsyncGenerator[Event, None]:
    for event in events:
        yield event
    if failure is not None:
        raise failure


async def test_each_event_is_one_block_and_the_first_has_the_type() -> None:
    bodies = [body async for body in server_sent(stream(ACCEPTED, CHUNK, pb.GenerateFinish()))]
    assert [body.content_type for body in bodies] == ["text/event-stream", "", ""]
    for body in bodies:
        assert body.data.startswith(b"data: {")
        assert body.data.endswith(b"}\n\n")
        assert body.data.count(b"\n") == 2


async def test_a_failure_before_the_first_event_stays_a_status() -> None:
    with pytest.raises(InvalidRequest):
        await anext(server_sent(stream(failure=InvalidRequest("prompt", "is bad"))))


@pytest.mark.parametrize(
    ("failure", "kind", "code", "message"),
    [
        (LegFailed("broke", field="x"), "service_unavailable_error", "leg_failed", "broke"),
        (KeyError("secret"), "server_error", "internal", "internal error: KeyError"),
    ],
)
async def test_a_failure_after_it_is_the_last_event(failure: Exception, kind: str, code: str, message: str) -> None:
    *_, last = [body async for body in server_sent(stream(ACCEPTED, failure=failure))]
    error = json.loads(last.data.removeprefix(b"data: "))["error"]
    assert error == {"message": message, "type": kind, "param": None, "code": code}


def test_every_code_of_ours_has_a_type() -> None:
    assert {error.code for error in ERROR_BY_REASON.values()} <= set(TYPE_BY_CODE)
