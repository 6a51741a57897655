"""Statistics of the peers benchmark, on windows with known results; and the words of its prompts."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.peers.clocks import Snapshot, Spent
from benchmarks.peers.environment import FORBIDDEN, PEERS, REQUIREMENTS, Environment
from benchmarks.peers.load.http_door import Body
from benchmarks.peers.load.recorder import Recorder
from benchmarks.peers.measurements import added_ms, quantile, summarise
from benchmarks.peers.running import Row
from benchmarks.peers.scenarios import PACED, SHORT, SLOW, chosen
from benchmarks.peers.tables import table
from benchmarks.peers.words import Words

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
BEFORE = Snapshot(
    at_s=100.0,
    front_s=5.0,
    proxy_s=1.0,
    workers_s=0.5,
    own_s=20.0,
    machine_s=50.0,
    stolen_s=0.0,
    front_rss_bytes=0,
    proxy_rss_bytes=0,
)
AFTER = replace(BEFORE, at_s=110.0, front_s=9.0, proxy_s=2.0, workers_s=1.5, own_s=28.0, machine_s=60.0, stolen_s=1.0)
SEEN = {
    "tokens": 20_000,
    "messages": 10_000,
    "requests": 100,
    "whole_ms": [1.0, 2.0, 3.0],
    "failures": {"no connection": 2},
    "ttft_ms": [(7, 12.0), (8, 15.0), (9, 30.0)],
    "gap_ms": {"p50": 10.0, "p99": 11.5, "max": 40.0},
}


@pytest.mark.parametrize(("part", "value"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.75, 3.0), (0.99, 4.0), (1.0, 4.0)])
def test_quantile_is_the_nearest_rank(part: float, value: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], part) == value


def test_quantile_of_nothing_is_none() -> None:
    assert quantile([], 0.5) is None


def test_added_time_is_each_request_less_its_own_wait_at_the_worker() -> None:
    assert added_ms([(1, 10.0), (2, 9.0), (3, 4.0)], [(2, 0.008), (1, 0.004), (4, 0.001)]) == pytest.approx([1.0, 6.0])


def test_spent_separates_others_from_own() -> None:
    spent = Spent.between(BEFORE, AFTER)
    assert spent.seconds == 10.0
    assert spent.front_s == 4.0
    # The machine worked 10 s, of which 8 were the benchmark's.
    assert spent.others_cores == pytest.approx(0.2)
    assert spent.stolen_cores == pytest.approx(0.1)


def test_summary_of_a_known_window() -> None:
    measurements = summarise(Spent.between(BEFORE, AFTER), SEEN, [(7, 0.010), (9, 0.010)], 1.0, has_proxy=True)
    assert measurements.tokens_per_s == 2_000
    assert measurements.tokens_per_message == 2.0
    assert measurements.requests_per_s == 10
    assert measurements.front_ms_per_1k_tokens == pytest.approx(200)
    assert measurements.proxy_ms_per_1k_tokens == pytest.approx(50)
    assert measurements.front_ms_per_request == pytest.approx(40)
    assert (measurements.ttft_p50_ms, measurements.ttft_p99_ms) == (15.0, 30.0)
    assert (measurements.added_ttft_p50_ms, measurements.added_ttft_p99_ms) == pytest.approx((2.0, 20.0))
    assert measurements.failed == 2
    assert measurements.is_quiet
    assert measurements.clients_cores == pytest.approx(0.1)


def test_a_window_beside_a_busy_machine_is_not_quiet() -> None:
    busy = replace(AFTER, machine_s=AFTER.machine_s + 1.1)
    assert not summarise(Spent.between(BEFORE, busy), SEEN, [], 0.0, has_proxy=False).is_quiet


def test_a_window_without_tokens_has_no_cost_for_each() -> None:
    nothing = {**SEEN, "tokens": 0, "messages": 0, "requests": 0, "ttft_ms": [], "whole_ms": []}
    measurements = summarise(Spent.between(BEFORE, AFTER), nothing, [], 0.0, has_proxy=False)
    assert measurements.front_ms_per_1k_tokens is None
    assert measurements.ttft_p50_ms is None


def test_recorder_counts_what_lies_in_the_window_only() -> None:
    recorder = Recorder()
    for at_s in (0.5, 1.0, 1.5, 2.0):
        recorder.tokens(at_s, 3)
    recorder.gap(1.0, 0.5)
    recorder.gap(2.0, 0.9)
    recorder.first(1.2, 7, 0.004)
    recorder.end(0.9, 0.5)
    recorder.failure(1.9, "broke")
    seen = recorder.window(1.0, 2.0)
    assert (seen["tokens"], seen["messages"], seen["requests"]) == (6, 2, 0)
    assert seen["gap_ms"]["max"] == pytest.approx(500)
    assert seen["ttft_ms"] == [(7, pytest.approx(4.0))]
    assert seen["failures"] == {"broke": 1}
    later = recorder.window(2.0, 3.0)
    assert (later["tokens"], later["gap_ms"]["max"], later["failures"]) == (3, pytest.approx(900), {})
    assert recorder.failed == 1


def test_recorder_scales_events_by_the_usage() -> None:
    recorder = Recorder()
    for at_s in (1.1, 1.2, 1.3):
        recorder.tokens(at_s, 1)
    recorder.usage(3, 6)
    assert recorder.window(1.0, 2.0)["tokens"] == 6


def test_a_chunked_body_is_the_same_however_it_is_cut() -> None:
    whole = b"5\r\nhello\r\n1c;x=y\r\ndata: [DONE]\n\n0123456789abcd\r\n0\r\n\r\n"
    for first in range(len(whole)):
        for second in range(first, len(whole)):
            body = Body()
            parts = (whole[:first], whole[first:second], whole[second:])
            assert b"".join(body.feed(part) for part in parts) == b"hellodata: [DONE]\n\n0123456789abcd"
            assert body.is_whole


def test_serial_numbers_survive_the_tokenizer() -> None:
    words, tokenizer = Words.of_model(MODEL), Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts = words.prompts(20, random.Random(1))
    seen = [next(prompts) for _ in range(700)]
    assert len({prompt for _, prompt in seen}) == len(seen)
    for serial, prompt in seen:
        ids = tokenizer.encode(f"<|bos|><|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False).ids
        assert words.serial_of_ids(ids) == serial
        assert words.serial_of_text(prompt) == serial


def test_a_foreign_prompt_has_no_serial_number() -> None:
    words = Words(["red", "key"], [10, 11])
    assert words.serial_of_ids([1, 2, 3]) is None
    assert words.serial_of_ids([10, 3, 11]) is None
    assert words.serial_of_text("red door key") is None


def test_an_answer_is_the_text_of_its_tokens() -> None:
    words, tokenizer = Words.of_model(MODEL), Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = tokenizer.decode(words.ids, skip_special_tokens=True)
    assert text == "".join(f" {word}" for word in words.texts)


def test_every_peer_is_pinned_and_none_brings_pytorch(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    for name, peer in PEERS.items():
        assert re.fullmatch(r"[0-9.]+", environment.version(name)), name
        for file in (*peer.requirements, *peer.without_dependencies):
            pins = [line for line in (REQUIREMENTS / file).read_text().splitlines() if not line.startswith("#")]
            assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), file
            assert not [pin for pin in pins if FORBIDDEN.match(pin)]


def test_scenarios_start_their_streams_over_one_answer() -> None:
    assert PACED.ramp_s(64) == pytest.approx(1.28)
    assert SLOW.ramp_s(5000) == 25.0
    assert chosen(["short"], {"short": (3,)}) == [replace(SHORT, streams=(3,))]
    with pytest.raises(KeyError):
        chosen(["other"], {})


def test_a_table_gives_the_reason_for_a_row_without_numbers() -> None:
    measurements = summarise(Spent.between(BEFORE, AFTER), SEEN, [], 1.0, has_proxy=False)
    rows = [Row("paced", "Tandem gRPC", 64, 3, measurements), Row("paced", "smg", 0, 0, None, "not here: no index | x")]
    lines = table(PACED, rows).splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert "| Tandem gRPC | 64 | 2,000 | 15.0 / 30.0 | - / - | 11.5 | 200 |" in lines[4]
    assert "not here: no index / x" in lines[5]
