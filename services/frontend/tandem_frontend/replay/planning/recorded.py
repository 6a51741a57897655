"""A running cluster as the subject of a plan: its workers as a fleet, its last requests as a trace.

Pure. Owns what stands in for what was not recorded: an answer in progress, the identity of cached blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from statistics import median
from typing import Any

from tandem.domain.recorded_load import RecordedCluster, RecordedRequest
from tandem.domain.worker import Capabilities, WorkerRole
from tandem.errors import ConfigError, StartError
from tandem_frontend.replay.fleet_file import FleetFile, parse_fleet
from tandem_frontend.replay.planning.candidate import quantile
from tandem_frontend.replay.planning.goals import Goals
from tandem_frontend.replay.planning.search import Shape
from tandem_frontend.replay.planning.speeds import Speeds
from tandem_frontend.replay.trace import TracedRequest

BLOCK_TOKENS_MIN = 16


def fleet_of(cluster: RecordedCluster, engine: dict[str, Any], frontend: dict[str, Any]) -> FleetFile:
    """The workers of a cluster as a fleet file.

    Args:
        cluster: what was recorded.
        engine: options of the simulated engine.
        frontend: the section of that name; empty: as many as the cluster has, all else by default.
    """
    block_tokens = _block_tokens(cluster.workers[0].capabilities)
    counts = Counter(worker.role for worker in cluster.workers)
    prefill, decode, aggregated = (_capabilities(cluster, role) for role in _ROLES)
    values: dict[str, Any] = {
        "block_tokens": block_tokens,
        "kv_bytes_per_token": max(1, cluster.workers[0].capabilities.kv_bytes_per_token),
        "prefill": {"cache_blocks": max(1, prefill.kv_capacity_tokens // block_tokens)},
        "decode": {
            "kv_capacity_tokens": decode.kv_capacity_tokens,
            "running_requests_max": decode.running_requests_max,
        },
        "aggregated": {
            "cache_blocks": max(1, aggregated.kv_capacity_tokens // block_tokens),
            "running_requests_max": aggregated.running_requests_max,
        },
        "frontend": frontend or {"count": len(cluster.frontends)},
        "engine": engine,
    }
    for role in _ROLES:
        values[role.value]["count"] = counts[role]
    if not (counts[WorkerRole.AGGREGATED] or (counts[WorkerRole.PREFILL] and counts[WorkerRole.DECODE])):
        raise StartError(
            "no pair of a prefill and a decode worker serves, and no aggregated one: no request can be served"
        )
    if bool(counts[WorkerRole.PREFILL]) != bool(counts[WorkerRole.DECODE]):
        # Half of a pair serves nothing beside aggregated workers.
        values["prefill"]["count"] = values["decode"]["count"] = 0
    return parse_fleet(values)


def trace_of(requests: Sequence[RecordedRequest], block_tokens: int) -> list[TracedRequest]:
    """The recorded requests as a trace.

    An answer in progress, or one that failed, is as long as the median one, or as it is by now. The cached part of a
    prompt is one chain of blocks that all prompts share: each prompt hits what it hit, but all hit the same.

    Raises:
        StartError: no request shows the length of its prompt and its answer.
    """
    prompts = [one.prompt_tokens for one in requests if one.prompt_tokens]
    answers = [one.answer_tokens for one in requests if one.is_finished and one.answer_tokens]
    if not prompts or not answers:
        raise StartError(f"none of {len(requests)} requests has finished yet: the length of their answers is not known")
    usual_prompt, usual_answer = round(median(prompts)), round(median(answers))
    own = count(2**32)
    begin_s = requests[0].begin_s
    return [
        TracedRequest(
            number=number,
            arrival_s=one.begin_s - begin_s,
            prompt_tokens=one.prompt_tokens or usual_prompt,
            answer_tokens=max(1, one.answer_tokens, 0 if one.is_finished else usual_answer),
            block_ids=tuple(_blocks(one, usual_prompt, block_tokens, own)),
        )
        for number, one in enumerate(requests)
    ]


def shape_of(asked: Shape, speeds: Speeds) -> tuple[Shape, str]:
    """The shape to search, and why it is not the one that was asked for; empty: it is.

    Raises:
        ConfigError: pairs were asked for, and no transfer was seen.
    """
    if speeds.transfer_bytes_per_s is not None or asked is Shape.AGGREGATED:
        return asked, ""
    why = "no KV transfer was seen, so that the speed of pairs is not known: give --fleet with an [engine]"
    if asked is Shape.PAIRS:
        raise ConfigError("shape", f"cannot be pairs: {why}")
    return Shape.AGGREGATED, f"only aggregated workers are planned: {why}"


def seen(cluster: RecordedCluster, goals: Goals) -> Iterator[str]:
    """What was seen, in sentences."""
    roles = Counter(worker.role for worker in cluster.workers)
    present = " + ".join(f"{roles[role]} {role.value}" for role in _ROLES if roles[role])
    span_s = cluster.requests[-1].begin_s - cluster.requests[0].begin_s
    rate = f"{len(cluster.requests) / span_s:.3g}/s" if span_s > 0 else "at once"
    yield f"seen of {cluster.model}: {present}; {len(cluster.requests):,} requests ({rate})"
    waiting = sum(one.waiting_requests for one in cluster.frontends)
    waits = quantile([one.queue_s for one in cluster.requests if one.queue_s is not None], goals.percentile)
    open_requests = sum(one.open_requests for one in cluster.frontends)
    yield (
        f"queue: {waiting} of {open_requests} open requests wait in the frontends, {cluster.waiting_prompts} in the "
        f"engines; wait in the frontends {goals.name} {waits:.3f} s"
    )
    ttft = [one.first_token_s - one.begin_s for one in cluster.requests if one.first_token_s is not None]
    itl = [
        (one.last_token_s - one.first_token_s) / (one.answer_tokens - 1)
        for one in cluster.requests
        if one.first_token_s is not None and one.last_token_s is not None and one.answer_tokens > 1
    ]
    yield (
        f"latency: TTFT {goals.name} {quantile(ttft, goals.percentile):.3f} s, ITL {goals.name} "
        f"{quantile(itl, goals.percentile) * 1e3:.1f} ms"
    )
    if cluster.missed_count:
        yield f"{cluster.missed_count:,} requests were evicted before they were read: the load was higher than shown"


def speeds_in_words(speeds: Speeds) -> str:
    """The measured speeds in a sentence."""
    assert speeds.prefill is not None, "asked for after a check"
    assert speeds.decode is not None, "asked for after a check"
    transfer = speeds.transfer_bytes_per_s
    moved = "" if transfer is None else f", KV transfer {transfer / 1e6:,.0f} MB/s"
    return (
        f"measured: prompts {1 / max(speeds.prefill[1], 1e-12):,.0f} tokens/s and {speeds.prefill[0] * 1e3:.2f} ms a "
        f"step; decode step {speeds.decode[0] * 1e3:.2f} ms and {speeds.decode[1] * 1e3:.3f} ms a request, seen up to "
        f"{speeds.batch_max:.1f} at a time{moved}"
    )


_ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED)


def _block_tokens(capabilities: Capabilities) -> int:
    """The page size; of smaller pages as many as make a block: a replay needs no finer ones."""
    page = max(1, capabilities.page_size_tokens)
    return page * -(-BLOCK_TOKENS_MIN // page)


def _capabilities(cluster: RecordedCluster, role: WorkerRole) -> Capabilities:
    """Those of the smallest worker of a role; of any role, where the cluster has none."""
    own = [one.capabilities for one in cluster.workers if one.role is role]
    return min(own or [one.capabilities for one in cluster.workers], key=lambda one: one.kv_capacity_tokens)


def _blocks(one: RecordedRequest, usual_prompt: int, block_tokens: int, own: Iterator[int]) -> Iterator[int]:
    total = -(-(one.prompt_tokens or usual_prompt) // block_tokens)
    shared = min(one.cached_tokens // block_tokens, total)
    yield from range(shared)
    yield from (next(own) for _ in range(total - shared))
