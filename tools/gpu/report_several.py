"""Markdown tables of the steps with several workers, and of the state of every step of a run."""

from __future__ import annotations

import re
from typing import Any

from tools.gpu import catalog
from tools.gpu.markdown_table import measured, table
from tools.gpu.results import COMPLETE, FAILED, NOT_RUN, PARTIAL, STEP

FLEET_LEVEL = re.compile(r"fleet_(?P<fleet>\w+?)_(?P<kind>short|long)_(?P<level>\d+)")
SAID_MAX = 90


def tables(results: dict[str, Any]) -> list[str]:
    """Every table for which there are measurements."""
    return [_fleets(results), _interference(results), _chats(results), _takeovers(results), _parallel(results)]


def states(results: dict[str, Any]) -> str:
    """What became of each step; one without a record was not run."""
    arguments = results.get("arguments", {})
    gpus = int(arguments["gpus"]) if str(arguments.get("gpus", "")).isdigit() else catalog.GPUS
    gpus *= int(arguments.get("engines_per_gpu", 1))
    recorded = [name.removeprefix(STEP) for name in results if name.startswith(STEP)]
    if not any(catalog.knows(name, gpus) for name in recorded):
        return ""
    names = dict.fromkeys((*(step.name for step in catalog.steps(gpus)), catalog.PLANNED, *recorded))
    rehearsed = arguments.get("device") == "cpu"
    rows = [(name, *_state(results.get(STEP + name), rehearsed)) for name in names]
    return table(("step", "fleet", "state", ""), rows)


def _state(step: Any, rehearsed: bool) -> tuple[str, str, str]:
    """Fleet, state and reason of one step."""
    if not isinstance(step, dict) or "state" not in step:
        return "", "not run", ""
    done = "rehearsed on a CPU" if rehearsed else "run"
    words = {COMPLETE: done, PARTIAL: f"{done} in part", FAILED: "failed", NOT_RUN: "not run"}
    missing = [f"{name}: {reason}"[:SAID_MAX] for name, reason in step.get("missing", {}).items()]
    said = [step["reason"]] if "reason" in step else missing
    if step.get("engines_share"):
        said.append(f"all engines on {step['gpus']} GPU")
    if "smaller_than" in step:
        said.append(f"instead of {step['smaller_than']}, which needs {step['as_made_for_needs_gpus']} GPUs")
    return step.get("fleet", ""), words[step["state"]], "; ".join(said)


def _fleets(results: dict[str, Any]) -> str:
    rows = []
    for name in results:
        found, level = FLEET_LEVEL.fullmatch(name), measured(results, name)
        if found is None or level is None or "ttft_ms" not in level:
            continue
        ttft, itl = level["ttft_ms"], level["itl_ms"]
        row = (found["fleet"], found["kind"], level["concurrent"], ttft["p50"], ttft["p99"], level["tpot_ms"]["p50"])
        used = ", ".join(f"{worker} {count}" for worker, count in level.get("by_worker", {}).items())
        rows.append((*row, itl["p99"], level["tokens_per_s"], level["failed"], used))
    head = ("fleet", "prompts", "at a time", "TTFT p50, ms", "p99", "ITL mean of a stream, p50, ms", "ITL p99, ms")
    return table((*head, "tokens/s", "failed", "requests by worker"), rows)


def _interference(results: dict[str, Any]) -> str:
    rows = []
    for name in results:
        busy = measured(results, name) if re.fullmatch(r"fleet_\w+_interference", name) else None
        if busy is not None and busy["busy_itl_ms"]:
            quiet, loud = busy["quiet_itl_ms"], busy["busy_itl_ms"]
            fleet = name.removeprefix(catalog.FLEET).removesuffix("_interference")
            row = (fleet, quiet.get("p50"), quiet.get("p99"), loud["p50"], loud["p99"], loud["max"])
            rows.append((*row, busy["long_ttft_ms"].get("p50")))
    head = ("fleet", "quiet ITL p50, ms", "quiet p99", "busy p50", "busy p99", "busy max", "TTFT of long prompts p50")
    return table(head, rows)


def _chats(results: dict[str, Any]) -> str:
    chats = measured(results, "chats")
    if chats is None:
        return ""
    rows = [
        (policy, found["requests"], found["hit_rate"], found["expected_hit_rate"], *map(found["ttft_ms"].get, PARTS))
        for policy, found in chats.items()
        if policy != "work"
    ]
    return table(("policy", "requests", "hit rate", "expected", "TTFT p50, ms", "p90", "p99"), rows)


PARTS = ("p50", "p90", "p99")


def _takeovers(results: dict[str, Any]) -> str:
    rows = []
    for name in ("kill_decode_of_two", "kill_prefill_of_two", "rolling_restart"):
        found = measured(results, name)
        if found is None:
            continue
        tokens, noise = found["tokens"], found.get("undisturbed_twice", {})
        pauses = found.get("went_on_after_ms") or found.get("longest_pause_of_a_stream_ms", {})
        row = (name, found["streams"], found.get("went_on", found["continued"]), found["lost"], found["whole"])
        equal = f"{tokens['streams_equal']} of {tokens['streams']}"
        without = f"{noise['streams_equal']} of {noise['streams']}" if noise else ""
        rows.append((*row, equal, without, pauses.get("p50", ""), pauses.get("max", "")))
    head = ("step", "streams", "went on elsewhere", "lost", "every token once", "equal to an undisturbed run")
    return table((*head, "two undisturbed runs", "pause p50, ms", "pause max, ms"), rows)


def _parallel(results: dict[str, Any]) -> str:
    found, single = measured(results, "tp2_streams"), measured(results, "tp2_one_by_one")
    if found is None:
        return ""
    names = {
        "alone": "TP 2, one at a time",
        "together": "TP 2, eight at once",
        "reference_together": "TP 1, eight at once",
    }
    rows = []
    for key, name in names.items():
        tokens = found[key]
        equal = f"{tokens['streams_equal']} of {tokens['streams']}"
        rows.append((name, equal, f"{tokens['tokens_equal']} of {tokens['tokens']}"))
    if single is not None:
        rows.append(("TP 2, each token after those of TP 1", "", f"{single['equal']} of {single['tokens']}"))
    return table(("beside TP 1, one at a time", "equal streams", "equal tokens"), rows)
