"""Text of `tandem trace`: a continued request, open and rejected requests, and the width of bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.cli.timeline import render
from tandem.observability.timeline_lines import lines_of

GOLDEN = Path(__file__).parent / "golden" / "timeline.txt"
BEGIN = "2026-11-25T03:34:28.%03dZ"


def at(offset_ms: float) -> dict[str, str]:
    return {"time": BEGIN % (offset_ms + 100), "offset": f"{offset_ms / 1e3:.6f}s"}


def leg(role: str, worker: str, port: int, accepted_ms: float | None, **timings: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "role": f"WORKER_ROLE_{role.upper()}", "worker_id": worker, "epoch": "1795577662202",
        "address": f"127.0.0.1:{port}", "timings": timings,
    }  # fmt: skip
    if accepted_ms is not None:
        fields["accepted"] = at(accepted_ms)
    return fields


def timeline(**fields: Any) -> pb.RequestTimeline:
    base = {"request_id": "r-1", "operation": "chat", "model": "tandem-demo", "begin": at(0)}
    return ParseDict({**base, **fields}, pb.RequestTimeline())


BROKEN = timeline(
    outcome="REQUEST_OUTCOME_FINISHED",
    finish_reason="FINISH_REASON_LENGTH",
    tenant="acme",
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    end=at(400),
    first_token=at(50),
    last_token=at(390),
    completion_tokens="40",
    usage={"prompt_tokens": 6, "completion_tokens": 40, "cached_tokens": 2},
    inter_token_latency={"count": "39", "p50": "0.002s", "p90": "0.0031s", "p99": "0.15s", "longest": "0.15s"},
    steps=[
        {"name": "admit", "begin": at(0), "end": at(0)},
        {"name": "tokenise", "begin": at(0), "end": at(4)},
        {"name": "route", "begin": at(4), "end": at(5), "attributes": {"attempt": "1"}},
        {"name": "route", "begin": at(210), "end": at(211), "attributes": {"attempt": "2"}},
    ],
    attempts=[
        {
            "number": 1, "bootstrap_room": "77", "candidates": 2, "dispatched": at(5),
            "prefill": leg(
                "prefill", "prefill-0", 4001, 8, queued_time=BEGIN % 108, prefill_start_time=BEGIN % 112,
                prefill_end_time=BEGIN % 132, kv_transfer_start_time=BEGIN % 132, kv_transfer_end_time=BEGIN % 140,
                kv_transfer_bytes="65536",
            ),
            "decode": leg("decode", "decode-0", 4002, 9),
            "first_token": at(50), "last_token": at(190), "end": at(200),
            "failure": {
                "leg": "WORKER_ROLE_DECODE", "worker_id": "decode-0", "phase": "decoding",
                "reason": "ERROR_REASON_LEG_FAILED",
            },
        },
        {
            "number": 2, "bootstrap_room": "78", "candidates": 1, "dispatched": at(212), "tokens_before": "27",
            "prefill": leg("prefill", "prefill-0", 4001, 214),
            "decode": leg("decode", "decode-1", 4003, 215),
            "first_token": at(240), "last_token": at(390), "end": at(400),
        },
    ],
    events=[{"name": "continued", "at": at(209), "attributes": {"after_tokens": "27"}}],
)  # fmt: skip


def test_a_continued_request_matches_the_golden_file() -> None:
    assert render(BROKEN, "frontend-0", width=106) + "\n" == GOLDEN.read_text()


def test_bars_have_equal_width() -> None:
    for width in (20, 80, 106, 300):
        lines = render(BROKEN, "frontend-0", width=width).split("WHAT\n")[1].splitlines()
        bar_width = min(60, max(20, width - 66))
        for line in lines:
            bar, rest = line[22 : 22 + bar_width], line[22 + bar_width :]
            assert rest.startswith("  ")
            assert not set(rest) & {"█", "╵", "▒"}
            assert set(bar) <= {" ", "█", "╵"}
            assert bar.strip()


def test_a_request_in_progress_is_shown_as_open() -> None:
    attempt = {
        "number": 1, "dispatched": at(5), "decode": leg("aggregated", "aggregated-0", 4004, 6),
        "first_token": at(20), "last_token": at(80), "end": None,
    }  # fmt: skip
    text = render(
        timeline(
            outcome="REQUEST_OUTCOME_OPEN",
            completion_tokens="31",
            first_token=at(20),
            last_token=at(80),
            steps=[{"name": "wait", "begin": at(0), "end": at(5)}],
            attempts=[attempt],
        ),
        "frontend-0",
    )
    assert text.startswith("request r-1 · open\n")
    assert "31 tokens so far · TTFT 20.0 ms" in text
    (line,) = [line for line in text.splitlines() if "attempt 1" in line]
    assert line.split()[2:5:2] == ["open", "attempt"]
    assert "▒" in line
    assert "room" not in text


def test_a_rejected_request_shows_the_reason() -> None:
    text = render(
        timeline(
            outcome="REQUEST_OUTCOME_REFUSED",
            error_reason="ERROR_REASON_NO_WORKERS",
            error_message="no decode worker is alive",
            end=at(1),
        ),
        "frontend-0",
    )
    assert text.startswith("request r-1 · refused: NO_WORKERS\n")
    assert "\nno decode worker is alive\n" in text


def test_waits_are_shown_separately_if_the_engine_reports_them() -> None:
    sent = leg(
        "prefill", "p", 1, 6, queued_time=BEGIN % 107, bootstrap_end_time=BEGIN % 110, prefill_start_time=BEGIN % 115
    )  # fmt: skip
    received = leg(
        "decode", "d", 2, 6, queued_time=BEGIN % 107, preallocation_end_time=BEGIN % 109,
        kv_transfer_start_time=BEGIN % 120, kv_transfer_end_time=BEGIN % 130,
    )  # fmt: skip
    attempt = {"number": 1, "dispatched": at(5), "prefill": sent, "decode": received, "end": at(50)}
    text = render(timeline(outcome="REQUEST_OUTCOME_FINISHED", end=at(60), attempts=[attempt]), "f")
    took = {line[22 + 34 :].strip(" █"): line[11:20].strip() for line in text.splitlines()}
    assert took["p: bootstrap with peer"] == "3.0 ms"
    assert took["p: waits in the prefill queue"] == "5.0 ms"
    assert took["d: bootstrap with peer, KV preallocation"] == "2.0 ms"
    assert took["d: waits for KV"] == "21.0 ms"
    assert "waits in the engine" not in text


def test_a_worker_clock_that_is_behind_gives_negative_times() -> None:
    account = {"prefill_start_time": "2026-11-25T03:34:28.050Z", "prefill_end_time": "2026-11-25T03:34:28.110Z"}
    attempt = {"number": 1, "dispatched": at(5), "decode": leg("decode", "d", 1, None, **account), "end": at(50)}
    text = render(timeline(outcome="REQUEST_OUTCOME_FINISHED", end=at(60), attempts=[attempt]), "f")
    assert "decode leg sent to d (127.0.0.1:1, epoch 1795577662202), not accepted" in text
    (line,) = [line for line in text.splitlines() if line.endswith("d: prefill")]
    assert line.split()[:4] == ["-50.0", "ms", "60.0", "ms"]
    assert line[22] == "█"


def test_a_request_through_the_edge_begins_there() -> None:
    through_edge = timeline(edge_begin=at(-3), steps=[{"name": "admit", "begin": at(0), "end": at(1)}])
    first, second = lines_of(through_edge)
    assert (first.part, first.begin_s, first.end_s) == ("edge", -0.003, 0.0)
    assert (second.part, second.text) == ("frontend", "admit")
    ahead, _ = lines_of(timeline(edge_begin=at(5), steps=[{"name": "admit", "begin": at(0), "end": at(1)}]))
    assert ahead.part == "frontend", "an edge whose clock is ahead"
    assert "edge" in render(through_edge, "frontend-0")
