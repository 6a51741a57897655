"""Markdown tables from a results file, as shown in benchmarks/README.md."""

from __future__ import annotations

from typing import Any

from tools.gpu import report_several
from tools.gpu.markdown_table import measured, table

SHAPES = ("pair", "aggregated", "two_aggregated")
GIB = 2**30


def tables(results: dict[str, Any]) -> str:
    """Every table for which there are measurements."""
    parts = [_throughput(results), _interference(results), _copies(results), _endings(results)]
    parts += [_decode_heavy(results), *report_several.tables(results), report_several.states(results)]
    return "\n\n".join(part for part in parts if part)


def _throughput(results: dict[str, Any]) -> str:
    rows = []
    names = [name for name in results if name.rpartition("_")[0] in SHAPES and name.rpartition("_")[2].isdigit()]
    for name in sorted(names, key=lambda name: (int(name.rpartition("_")[2]), SHAPES.index(name.rpartition("_")[0]))):
        level = measured(results, name)
        if level is None or "ttft_ms" not in level:
            continue
        ttft, pace = level["ttft_ms"], level["tpot_ms"]
        row = (
            level["concurrent"],
            name.rpartition("_")[0],
            ttft["p50"],
            ttft["p99"],
            pace["p50"],
            level["itl_ms"]["p99"],
        )
        rows.append((*row, level["tokens_per_s"], level["failed"]))
    head = ("at a time", "cluster", "TTFT p50, ms", "p99", "ITL mean of a stream, p50, ms", "ITL p99, ms")
    return table((*head, "tokens/s", "failed"), rows)


def _interference(results: dict[str, Any]) -> str:
    rows = []
    for shape in SHAPES:
        busy = measured(results, f"{shape}_interference")
        if busy is not None and busy["busy_itl_ms"]:
            quiet, loud = busy["quiet_itl_ms"], busy["busy_itl_ms"]
            row = (shape, quiet.get("p50"), quiet.get("p99"), loud["p50"], loud["p99"], loud["max"])
            rows.append((*row, busy["long_ttft_ms"].get("p50")))
    head = ("cluster", "quiet ITL p50, ms", "quiet p99", "busy p50", "busy p99", "busy max", "TTFT of long prompts p50")
    return table(head, rows)


def _copies(results: dict[str, Any]) -> str:
    rows = []
    for name in results:
        copies = measured(results, name) if name.startswith("copies_") else None
        if copies is None:
            continue
        plain = {row["bytes"]: row["gbytes_per_s"] for row in copies["copy"]}
        for row in copies["nixl"]["rows"]:
            size = f"{row['bytes'] / 2**20:g} MiB"
            rows.append((size, row["pieces"], row["ms"], row["gbytes_per_s"], plain.get(row["bytes"])))
    return table(("bytes", "pieces", "NIXL, ms", "NIXL, GB/s", "plain copy, GB/s"), rows)


def _endings(results: dict[str, Any]) -> str:
    rows = []
    for name in ("cancel_decoding", "cancel_prefilling", "kill_decode", "kill_prefill"):
        ending = measured(results, name)
        if ending is not None:
            held = ending.get("kv_tokens_at_cancel") or ending.get("kv_tokens_at_kill")
            rows.append((name, ending["streams"], held, ending["kv_tokens_after"], ending["freed_after_s"]))
    return table(("what", "streams", "KV tokens held then", "held after", "after, s"), rows)


def _decode_heavy(results: dict[str, Any]) -> str:
    rows = []
    for name in results:
        side = measured(results, name) if name.startswith("decode_heavy_") else None
        if side is None or "tokens_per_s" not in side:
            continue
        base, _, who = name.rpartition("_")
        ratios = (measured(results, f"{base}_ratios") or {}) if who == "tandem" else {}
        measurements = [
            side.get(key)
            for key in ("tokens_per_s", "steady_tokens_per_s", "itl_mean_p50_ms", "gap_p99_ms", "steady_gap_p99_ms")
        ]
        shares = [ratios.get(key, "") for key in ("steady_tokens_per_s", "gap_p99_ms", "steady_gap_p99_ms")]
        busy = ", ".join(f"{process} {cores}" for process, cores in side["cores"].items())
        shape = "pair" if name.startswith("decode_heavy_pair") else "aggregated"
        order = "Tandem first" if base.endswith("_tandem_first") else "bare first"
        rows.append(
            (side["streams"], shape, order, who, *measurements, side["ttft_p50_ms"], side["failed"], *shares, busy)
        )
    head = (
        "streams",
        "cluster",
        "order",
        "side",
        "tokens/s",
        "steady tokens/s",
        "ITL mean p50, ms",
        "gap p99, ms",
        "steady",
    )
    return table((*head, "TTFT p50, ms", "failed", "steady, of bare", "gap p99, of bare", "steady", "cores"), rows)
