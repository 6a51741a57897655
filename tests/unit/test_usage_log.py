"""What a call has used, its line for billing, the metrics of tenants, and the file that loses no line."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.call_usage import CallUsage, TenantMetrics, UsageEntry, UsageSums

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.errors import ConfigError
from tandem.observability.line_log import LineLog
from tandem.observability.metric_attributes import OTHER
from tandem.observability.metrics import Metrics
from tandem.observability.request_trace import AttemptTrace, RequestTrace


def generation(
    prompt: int, completion: int, *, cached: int = 0, dispatched: bool = True, name: str = "r"
) -> RequestTrace:
    trace = RequestTrace(request_id=name, prompt_tokens=prompt, token_count=completion)
    if dispatched:
        usage = generation_pb2.Usage(cached_tokens=cached)
        trace.add_attempt(AttemptTrace(decode_finish=leg_pb2.LegFinish(usage=usage)))
    return trace


def finished(prompt: int, completion: int, cached: int = 0, name: str = "r") -> RequestTrace:
    trace = generation(prompt, completion, name=name)
    trace.finish("length", prompt, completion, cached)
    return trace


def sums_of(*traces: RequestTrace, choices: int = 1) -> UsageSums:
    usage = CallUsage()
    usage.choices_per_prompt = choices
    firsts = [usage.add(trace) for trace in traces]
    assert firsts == [number % choices == 0 for number in range(len(traces))]
    return usage.summed()


def test_a_prompt_counts_once_for_its_choices_and_the_cache_as_it_was_before() -> None:
    traces = [finished(10, 3, 0, "first"), finished(10, 4, 9), finished(7, 1, 5), finished(7, 2, 6)]
    assert sums_of(*traces, choices=2) == UsageSums("first", 17, 5, 10, "finished", "length")


def test_a_cancelled_generation_counts_what_was_computed() -> None:
    trace = generation(10, 3, cached=8)
    trace.cancel()
    assert sums_of(trace) == UsageSums("r", 10, 8, 3, "cancelled", "client_left")


def test_a_request_that_reached_no_worker_used_nothing() -> None:
    trace = generation(10, 0, dispatched=False)
    trace.fail("NO_WORKERS", "no workers")
    assert sums_of(trace) == UsageSums("r", 0, 0, 0, "refused", "NO_WORKERS")


def test_the_choice_that_failed_says_how_the_call_ended() -> None:
    cancelled, failed = generation(5, 1), generation(5, 2)
    cancelled.cancel()
    failed.fail("LEG_FAILED", "a leg failed")
    sums = sums_of(finished(5, 4), cancelled, failed, choices=3)
    assert (sums.outcome, sums.reason, sums.completion_tokens) == ("failed", "LEG_FAILED", 7)


def entry(tenant: str = "alice", **sums: Any) -> UsageEntry:
    return UsageEntry(
        end_s=1_700_000_000.25,
        tenant=tenant,
        call_id="call",
        operation="chat",
        model="m",
        choices=2,
        sums=UsageSums(**sums),
    )


def test_the_line() -> None:
    line = entry(
        request_id="r", prompt_tokens=3, cached_tokens=2, completion_tokens=1, outcome="finished", reason="stop"
    )
    assert json.loads(line.as_line()) == {
        "event": "usage",
        "time": "2023-11-14T22:13:20.250Z",
        "tenant": "alice",
        "request_id": "r",
        "call_id": "call",
        "operation": "chat",
        "model": "m",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "completion_tokens": 1,
        "choices": 2,
        "outcome": "finished",
        "reason": "stop",
    }
    assert json.loads(entry("").as_line())["tenant"] is None


class Counted(Metrics):
    """Metrics that remember."""

    def __init__(self) -> None:
        self.counts: list[tuple[str, float, dict[str, str]]] = []

    def count(self, name: str, amount: float = 1, attributes: Any = ()) -> None:
        self.counts.append((name, amount, dict(attributes)))


def test_the_metrics_name_so_many_tenants_and_no_more() -> None:
    metrics = Counted()
    tenants = TenantMetrics(metrics, names_max=2)
    for tenant in ("a", "b", "c", "a", "d", ""):
        tenants(entry(tenant, prompt_tokens=5, cached_tokens=3, completion_tokens=2, outcome="finished"))
    tenants.refused("d", "open_requests")
    requests = [about for name, _, about in metrics.counts if name == "tandem.tenant.requests"]
    assert [about["tandem.tenant"] for about in requests] == ["a", "b", OTHER, "a", OTHER]
    tokens = [(about["tandem.tokens"], amount) for name, amount, about in metrics.counts if name.endswith("tokens")]
    assert tokens[:3] == [("prompt", 5), ("cached", 3), ("completion", 2)]
    assert metrics.counts[-1][2] == {"tandem.tenant": OTHER, "tandem.quota": "open_requests"}


def test_lines_of_several_writers_are_whole_and_the_file_is_private(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    logs = [LineLog(str(file)) for _ in range(3)]

    def write(log: LineLog, name: int) -> None:
        for number in range(500):
            log.write(json.dumps({"name": name, "number": number, "rest": "x" * 200}))

    threads = [threading.Thread(target=write, args=(log, name)) for name, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for name in range(3):
        assert [line["number"] for line in lines if line["name"] == name] == list(range(500))
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_rotated_is_created_again(tmp_path: Path) -> None:
    file, old = tmp_path / "usage.jsonl", tmp_path / "usage.jsonl.1"
    first = LineLog(str(file))
    first.write("one")
    first.close()
    log = LineLog(str(file))
    file.rename(old)
    log.write("two")
    log.close()
    assert old.read_text() == "one\n"
    assert file.read_text() == "two\n"


def test_while_the_disk_is_full_lines_wait_and_beyond_the_limit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "usage.jsonl"
    is_full, tried, real_write = threading.Event(), threading.Event(), os.write
    is_full.set()

    def write(descriptor: int, data: bytes) -> int:
        if is_full.is_set():
            tried.set()
            raise OSError(28, "No space left on device")
        return real_write(descriptor, data[:7])

    monkeypatch.setattr(os, "write", write)
    log = LineLog(str(file), lines_max=3, retry_s=0.01)
    log.write("first line")
    assert tried.wait(5)
    for number in range(5):
        log.write(f"line {number}")
    assert log.lost_count == 2
    is_full.clear()
    log.close()
    assert file.read_text().splitlines() == ["first line", "line 0", "line 1", "line 2"]


def test_a_file_that_cannot_be_opened_is_an_invalid_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"usage_log: .*cannot be opened"):
        LineLog(str(tmp_path / "missing" / "usage.jsonl"))


def test_standard_error_takes_lines_too(capfd: pytest.CaptureFixture[str]) -> None:
    log = LineLog("stderr")
    log.write("a line")
    log.close()
    assert capfd.readouterr().err == "a line\n"
