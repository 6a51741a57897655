"""Traces: Mooncake's format, errors that name the line, arrival times recorded in steps, hashes of prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.replay.trace import ChainHashes, TracedRequest, read_trace, scaled, spread

from benchmarks.replay.made_traces import conversations, write
from tandem.errors import ConfigError

ROW = {"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [7, 8]}


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def file_of(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_a_trace_is_read_in_the_order_of_arrival_from_zero(tmp_path: Path) -> None:
    lines = [json.dumps(row(timestamp=3500, output_length=1)), "", json.dumps(ROW)]
    requests = read_trace(file_of(tmp_path, *lines), 512)
    assert requests == [TracedRequest(0, 0.0, 700, 5, (7, 8)), TracedRequest(1, 2.5, 700, 1, (7, 8))]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"timestamp": 1', "is not JSON"),
        ("[1]", "must be an object"),
        (json.dumps(row(timestamp=-1)), "timestamp must be a number of milliseconds, at least 0, not -1"),
        (json.dumps(row(timestamp="soon")), "timestamp must be a number of milliseconds, at least 0, not 'soon'"),
        ('{"timestamp": NaN, "input_length": 1}', "timestamp must be a number of milliseconds, at least 0, not nan"),
        (json.dumps(row(input_length=0)), "input_length must be a whole number, 1 to 2147483648, not 0"),
        (json.dumps(row(output_length=1.5)), "output_length must be a whole number, 1 to 2147483648, not 1.5"),
        (json.dumps(row(output_length=True)), "output_length must be a whole number, 1 to 2147483648, not True"),
        (json.dumps(row(hash_ids="7")), "hash_ids must be a list of whole numbers, not '7'"),
        (json.dumps(row(hash_ids=[7, None])), "hash_ids must be a list of whole numbers, not [7, None]"),
        (json.dumps(row(hash_ids=[7, 8, 9])), "hash_ids must have 2 blocks of 512 tokens for 700 tokens, not 3"),
        (json.dumps(row(hash_ids=[7, 2**63])), "hash_ids must be numbers of at most 63 bits"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str, problem: str) -> None:
    file = file_of(tmp_path, json.dumps(ROW), "", line, json.dumps(ROW))
    with pytest.raises(ConfigError) as refused:
        read_trace(file, 512)
    assert f"{file}, line 3: {problem}" in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl cannot be read: No such file"):
        read_trace(tmp_path / "absent.jsonl", 512)
    with pytest.raises(ConfigError, match="has no requests"):
        read_trace(file_of(tmp_path, ""), 512)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(byte 0\)"):
        read_trace(tmp_path / "binary", 512)


def stepped(step_s: float, each: int) -> list[TracedRequest]:
    return [TracedRequest(n, n // each * step_s, 10, 1, ()) for n in range(30 * each)]


def test_arrivals_in_steps_are_spread_over_them_in_their_order() -> None:
    recorded = stepped(3.0, 10)
    requests = spread(recorded, seed=1)
    for request, before in zip(requests, recorded, strict=True):
        assert before.arrival_s <= request.arrival_s < before.arrival_s + 3.0
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    assert len(set(times)) == len(times)
    offsets = [time % 3.0 for time in times]
    assert 1.3 < sum(offsets) / len(offsets) < 1.7
    assert spread(recorded, seed=1) == requests
    assert spread(recorded, seed=2) != requests


@pytest.mark.parametrize("recorded", [stepped(3.0, 1), stepped(0.001, 10), stepped(3.0, 10)[:1]])
def test_other_arrivals_stay_as_they_were_recorded(recorded: list[TracedRequest]) -> None:
    assert spread(recorded, seed=1) == recorded


def test_load_scales_the_rate_of_arrivals() -> None:
    assert [request.arrival_s for request in scaled(stepped(3.0, 1)[:3], 2.0)] == [0.0, 1.5, 3.0]


def test_a_hash_depends_on_every_block_before_it() -> None:
    chains = ChainHashes()
    one, other = chains.of((1, 2, 3)), chains.of((9, 2, 3))
    assert one == ChainHashes().of((1, 2, 3))
    assert one[:2] == chains.of((1, 2))
    assert not set(one) & set(other)
    assert all(-(2**63) <= value < 2**63 for value in one)


def test_made_conversations_are_a_trace_that_shares_prefixes(tmp_path: Path) -> None:
    requests = read_trace(write(conversations(20, seed=3), tmp_path / "made.jsonl"), 512)
    assert len(requests) > 40
    assert all(request.block_ids[0] == 0 for request in requests)
    assert len({one for request in requests for one in request.block_ids}) < sum(len(r.block_ids) for r in requests) / 2
