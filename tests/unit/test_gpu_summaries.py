"""Statistics and tables of a GPU run: hand-made streams in, known numbers out."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tools.gpu import llama, measures, report, summaries
from tools.gpu.callers import Work
from tools.gpu.results import Results
from tools.gpu.summaries import Streamed

if TYPE_CHECKING:
    from tandem.local_cluster.cluster import LocalCluster


def test_a_quantile_is_a_value_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert summaries.quantile(values, 0.5) == 50
    assert summaries.quantile(values, 0.99) == 99
    assert summaries.quantile([3.0], 0.99) == 3


def test_a_level_counts_tokens_over_the_time_of_all_streams() -> None:
    streams = [Streamed(0.0, (0.1, 0.2, 0.2)), Streamed(0.5, (0.8, 1.0)), Streamed(0.0, (), "UNAVAILABLE: gone")]
    level = summaries.summary(streams)
    assert (level["requests"], level["failed"], level["failures"]) == (3, 1, ["UNAVAILABLE: gone"])
    assert level["tokens"] == 5
    assert level["tokens_per_s"] == 5.0
    assert level["ttft_ms"]["p50"] == 100.0  # type: ignore[index]
    assert level["ttft_ms"]["max"] == pytest.approx(300.0)  # type: ignore[index]
    assert level["itl_ms"]["p50"] == pytest.approx(100.0)  # type: ignore[index]


def test_a_pace_of_transfers_is_bytes_over_their_own_time() -> None:
    streams = [
        Streamed(0.0, (0.1,), moved_bytes=2 * 10**9, recomputed_tokens=0, moving_s=0.5),
        Streamed(0.0, (0.1,), moved_bytes=10**9, recomputed_tokens=0, moving_s=0.1),
        Streamed(0.0, (0.1,)),
    ]
    moved = summaries.transfers(streams)
    assert (moved["requests"], moved["bytes"], moved["recomputed_tokens"]) == (2, 3 * 10**9, 0)
    assert (moved["gbytes_per_s_p50"], moved["gbytes_per_s_max"]) == (4.0, 10.0)
    assert summaries.transfers([Streamed(0.0, (0.1,))]) == {}


def test_gaps_are_taken_from_the_window_they_end_in() -> None:
    stream = Streamed(0.0, (1.0, 2.0, 4.0, 8.0))
    assert summaries.within([stream], 2.0, 5.0) == [1.0, 2.0]


class ScriptedCallers:
    """Callers whose decodes have tokens at given moments after the call, and whose long prompts have one soon."""

    def __init__(self, decode_tokens_after_s: tuple[float, ...]) -> None:
        self.decode_tokens_after_s = decode_tokens_after_s

    async def run(self, works: list[Work]) -> list[list[Streamed]]:
        begin_s = time.monotonic()
        after_s = self.decode_tokens_after_s if works[0].new_tokens > 2 else (100.0, 200.0)
        return [[Streamed(begin_s, tuple(begin_s + later_s for later_s in after_s))]]


def interference(monkeypatch: pytest.MonkeyPatch, decode_tokens_after_s: tuple[float, ...]) -> dict[str, Any]:
    monkeypatch.setattr(measures, "LEAD_S", 0.0)
    cluster = SimpleNamespace(frontends=[SimpleNamespace(address="127.0.0.1:1")])
    callers: Any = ScriptedCallers(decode_tokens_after_s)
    return asyncio.run(measures.interference(cast("LocalCluster", cluster), callers, measures.REHEARSAL, 100))


def test_gaps_beside_long_prompts_are_a_measurement_only_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    found = interference(monkeypatch, (50.0, 100.0, 160.0))
    assert found["busy_itl_ms"]["max"] == pytest.approx(60_000.0)
    with pytest.raises(RuntimeError, match="the streams had ended, or never began"):
        interference(monkeypatch, (-100.0, -50.0))


def test_a_measurement_that_fails_or_finds_no_time_is_a_result(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results = Results(file, deadline_s=50)

    async def good() -> dict[str, int]:
        return {"value": 1}

    async def bad() -> dict[str, int]:
        raise ValueError("no")

    async def all_of_them() -> list[bool]:
        return [await results.take("a", 1, good), await results.take("b", 1, bad), await results.take("c", 99, good)]

    assert asyncio.run(all_of_them()) == [True, False, False]
    kept = json.loads(file.read_text())
    assert kept["a"] == {"value": 1}
    assert kept["b"]["error"] == "ValueError: no"
    assert "it takes 99" in kept["c"]["skipped"]


def test_tables_show_what_was_taken_and_nothing_else() -> None:
    level = summaries.summary([Streamed(0.0, (0.1, 0.2))])
    results = {
        "pair_8": {"concurrent": 8, **level},
        "pair_64": {"skipped": "3 s were left"},
        "aggregated_8": {"error": "StartError: no", "after_s": 1},
        "pair_interference": {"error": "x"},
    }
    text = report.tables(results)
    assert text.count("\n") == 2
    assert "| 8 | pair | 100.0 |" in text
    assert report.tables({}) == ""


def test_the_large_model_has_llama_3_8bs_size() -> None:
    shapes = llama.weight_shapes(llama.config("llama-8b"))
    count = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        count += size
    assert count == 8_030_261_248


def test_every_token_of_the_large_vocabulary_has_a_text_of_its_own() -> None:
    tokenizer: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [{"id": 1, "content": "<s>"}]}
    words = llama.extended_tokenizer(tokenizer, 6)["model"]["vocab"]
    assert sorted(words.values()) == [0, 2, 3, 4, 5]
    assert len(words) == 5
    assert tokenizer["model"]["vocab"] == {"a": 0, "b": 2}
