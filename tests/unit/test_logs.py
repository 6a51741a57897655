"""Log lines: request ids, one summary per request, no secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tandem.domain.generation import EngineFinish, FinishReason
from tandem.errors import InvalidRequest, LegFailed, Overloaded, TandemError
from tandem.observability import logs
from tandem.observability.request_trace import AttemptTrace, LegTrace, RequestTrace
from tandem.observability.trace_context import TraceContext
from tandem.observability.trace_store import TraceStore
from tandem.worker.stats import LegStats
from tests.unit.support.frontend_workers import decode, prefill

log = logging.getLogger("tandem.test")


Stream = pytest.CaptureFixture[str]


@pytest.fixture
def stream(capsys: Stream) -> Iterator[Stream]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.about.set(None)
    yield capsys
    root.handlers[:], root.level = before
    logs.about.set(None)


def entries(stream: Stream) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.readouterr().err.splitlines()]


def test_a_line_is_one_object(stream: Stream) -> None:
    logs.set_up("info", "auto", "tandem-test")
    log.info("two\nlines of %s", "text")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("a defect")
    first, second = entries(stream)
    assert (first["level"], first["service"], first["logger"]) == ("INFO", "tandem-test", "tandem.test")
    assert first["message"] == "two\nlines of text"
    assert first["time"].endswith("Z")
    assert "request_id" not in first
    assert "ValueError: broken" in second["exception"]


def test_a_terminal_gets_text(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logs.set_up("info", "auto", "tandem-test")
    with TraceStore[RequestTrace]().following(RequestTrace(request_id="r-1")):
        log.warning("look")
    assert stream.readouterr().err.endswith(" WARNING tandem.test look [request_id=r-1]\n")


async def test_lines_of_requests_at_the_same_time_do_not_mix(stream: Stream) -> None:
    logs.set_up("info", "json", "tandem-test")
    traces: TraceStore[RequestTrace] = TraceStore()

    async def request(name: str) -> None:
        with traces.following(RequestTrace(request_id=name, parent=TraceContext(int(name[1:]), 1))):
            for _ in range(3):
                await asyncio.sleep(0)
                log.info("work of %s", name)

    await asyncio.gather(*(asyncio.create_task(request(f"r{number}")) for number in range(1, 4)))
    logged = entries(stream)
    assert len(logged) == 9
    for entry in logged:
        assert entry["message"] == f"work of {entry['request_id']}"
        assert int(entry["trace_id"], 16) == int(entry["request_id"][1:])


def test_a_request_is_one_line_when_it_ends(stream: Stream) -> None:
    logs.set_up("info", "json", "tandem-frontend")
    traces: TraceStore[RequestTrace] = TraceStore([logs.log_request])
    attempt = AttemptTrace(room=77, prefill_worker=prefill(), decode_worker=decode())
    trace = RequestTrace(request_id="r-1", operation="chat", model="m", tenant="alice", parent=TraceContext(10, 11))
    with traces.following(trace):
        trace.add_attempt(attempt)
        trace.note_tokens(trace.clock(), 3)
        trace.finish("stop", 9, 3, 8)
    (entry,) = entries(stream)
    for name, value in {
        "logger": "tandem.request",
        "request_id": "r-1",
        "trace_id": f"{10:032x}",
        "operation": "chat",
        "model": "m",
        "tenant": "alice",
        "outcome": "finished",
        "reason": "stop",
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "cached_tokens": 8,
        "attempts": 1,
        "workers": ["prefill-0", "decode-0"],
        "room": 77,
    }.items():
        assert entry[name] == value, name
    assert 0 <= entry["ttft_ms"] <= entry["duration_ms"]


def test_a_clients_input_is_not_logged(stream: Stream) -> None:
    logs.set_up("debug", "json", "tandem-frontend")
    traces: TraceStore[RequestTrace] = TraceStore([logs.log_request])
    trace = RequestTrace(request_id="r-1", prompt="my secret prompt")
    with contextlib.suppress(InvalidRequest), traces.following(trace):
        raise InvalidRequest("guided.regex", "my secret pattern cannot be used")
    (entry,) = entries(stream)
    assert "secret" not in json.dumps(entry)
    assert "secret" not in trace.message
    assert (entry["outcome"], entry["reason"]) == ("refused", "INVALID_REQUEST")


def test_the_line_of_a_refused_request_names_its_ids_its_client_the_field_and_the_reason(stream: Stream) -> None:
    logs.set_up("info", "json", "tandem-frontend")
    traces: TraceStore[RequestTrace] = TraceStore([logs.log_request])
    trace = RequestTrace(request_id="r-1", call_id="x-1", operation="chat", tenant="alice")
    with contextlib.suppress(InvalidRequest), traces.following(trace):
        raise InvalidRequest("guided.regex", "cannot be used")
    (entry,) = entries(stream)
    assert entry["message"] == "chat refused: INVALID_REQUEST, field guided.regex"
    named = {name: entry[name] for name in ("request_id", "call_id", "tenant", "reason", "field")}
    assert list(named.values()) == ["r-1", "x-1", "alice", "INVALID_REQUEST", "guided.regex"]
    assert "error" not in entry


def test_the_line_of_a_request_that_finds_no_capacity_says_why(stream: Stream) -> None:
    logs.set_up("info", "json", "tandem-frontend")
    traces: TraceStore[RequestTrace] = TraceStore([logs.log_request])
    with contextlib.suppress(Overloaded), traces.following(RequestTrace(request_id="r-1", operation="chat")):
        raise Overloaded("the queue is full")
    (entry,) = entries(stream)
    assert (entry["message"], entry["error"]) == ("chat refused: OVERLOADED", "the queue is full")
    assert "field" not in entry


def test_a_leg_that_the_engine_refuses_is_no_failure_of_its_worker(stream: Stream) -> None:
    logs.set_up("info", "json", "tandem-decode")
    traces: TraceStore[LegTrace] = TraceStore([logs.log_leg])
    stats = LegStats(traces)
    for problem in (InvalidRequest("guided.regex", "cannot be used"), LegFailed("no KV came")):
        with contextlib.suppress(TandemError), traces.following(LegTrace(request_id="r-1", role="decode")):
            raise problem
    (entry,) = entries(stream)
    assert entry["reason"] == "LEG_FAILED"
    assert [trace.outcome for trace in traces.closed] == ["refused", "failed"]
    assert stats.counts()["failed_legs"] == 1


def test_cached_prompt_tokens_of_finished_legs_are_counted() -> None:
    traces: TraceStore[LegTrace] = TraceStore([])
    stats = LegStats(traces)
    for cached_tokens in (64, 0):
        with traces.following(LegTrace(request_id="r-1", role="prefill", prompt_tokens=100)) as trace:
            trace.finish(EngineFinish(reason=FinishReason.LENGTH, prompt_tokens=100, cached_tokens=cached_tokens))
    assert (stats.counts()["cached_tokens"], stats.counts()["prompt_tokens"]) == (64, 200)


def test_a_failed_leg_is_a_warning_and_a_finished_one_is_not(stream: Stream) -> None:
    logs.set_up("info", "json", "tandem-decode")
    traces: TraceStore[LegTrace] = TraceStore([logs.log_leg])
    with traces.following(LegTrace(request_id="fine")) as trace:
        trace.outcome = "finished"
    with contextlib.suppress(LegFailed), traces.following(LegTrace(request_id="broken", role="decode", attempt=2)):
        raise LegFailed("no KV came")
    (entry,) = entries(stream)
    assert (entry["request_id"], entry["attempt"], entry["reason"]) == ("broken", 2, "LEG_FAILED")
