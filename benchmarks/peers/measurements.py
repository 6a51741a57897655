"""Statistics of a window: from clocks and the clients' records to the numbers of a table.

Pure. Owns the rule for which windows are valid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.clocks import Spent

OTHERS_CORES_MAX = 0.3
"""A window in which the rest of the machine did more is measured again."""


def quantile(ordered: Sequence[float], part: float) -> float | None:
    """The value below or at which this part of an ordered sequence lies (nearest rank); None of an empty one."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def added_ms(ttft_ms: Iterable[tuple[int, float]], waits_s: Iterable[tuple[int, float]]) -> list[float]:
    """What the front added to each request's first token: TTFT less the worker's own time for the same request.

    Ordered. Requests that only one side knows are left out.
    """
    own_ms = {serial: 1e3 * wait_s for serial, wait_s in waits_s}
    return sorted(ms - own_ms[serial] for serial, ms in ttft_ms if serial in own_ms)


def is_quiet(spent: Spent) -> bool:
    """Whether a window counts."""
    return spent.others_cores <= OTHERS_CORES_MAX


@dataclass(frozen=True)
class Measurements:
    """One window of one system; None: there is no such measurement."""

    seconds: float
    tokens: int
    tokens_per_s: float
    tokens_per_message: float | None
    requests: int
    requests_per_s: float
    failures: Mapping[str, int]
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    own_ttft_p50_ms: float | None
    """Of the worker alone, from the leg's arrival there."""
    added_ttft_p50_ms: float | None
    added_ttft_p99_ms: float | None
    gap_p99_ms: float | None
    gap_max_ms: float | None
    whole_p50_ms: float | None
    front_ms_per_1k_tokens: float | None
    proxy_ms_per_1k_tokens: float | None
    front_ms_per_request: float | None
    proxy_ms_per_request: float | None
    front_cores: float
    proxy_cores: float
    workers_cores: float
    clients_cores: float
    others_cores: float
    stolen_cores: float
    is_quiet: bool

    @property
    def failed(self) -> int:
        """How many answers broke or never began."""
        return sum(self.failures.values())

    def to_json(self) -> dict[str, Any]:
        """Rounded, for the file of results."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def summarise(
    spent: Spent, seen: Mapping[str, Any], waits_s: Sequence[tuple[int, float]], clients_s: float, *, has_proxy: bool
) -> Measurements:
    """The measurements of a window: clocks, what the clients saw in it, and the workers' own times."""
    ttft_ms = sorted(ms for _, ms in seen["ttft_ms"])
    added = added_ms(seen["ttft_ms"], waits_s)
    own_ms = sorted(1e3 * wait_s for _, wait_s in waits_s)
    tokens, requests, messages = seen["tokens"], seen["requests"], seen["messages"]

    def per(cpu_s: float, count: float) -> float | None:
        return 1e3 * cpu_s / count if count else None

    return Measurements(
        seconds=spent.seconds,
        tokens=tokens,
        tokens_per_s=tokens / spent.seconds,
        tokens_per_message=tokens / messages if messages else None,
        requests=requests,
        requests_per_s=requests / spent.seconds,
        failures=seen["failures"],
        ttft_p50_ms=quantile(ttft_ms, 0.5),
        ttft_p99_ms=quantile(ttft_ms, 0.99),
        own_ttft_p50_ms=quantile(own_ms, 0.5),
        added_ttft_p50_ms=quantile(added, 0.5),
        added_ttft_p99_ms=quantile(added, 0.99),
        gap_p99_ms=seen["gap_ms"]["p99"],
        gap_max_ms=seen["gap_ms"]["max"],
        whole_p50_ms=quantile(seen["whole_ms"], 0.5),
        front_ms_per_1k_tokens=per(spent.front_s, tokens / 1e3),
        proxy_ms_per_1k_tokens=per(spent.proxy_s, tokens / 1e3) if has_proxy else None,
        front_ms_per_request=per(spent.front_s, requests),
        proxy_ms_per_request=per(spent.proxy_s, requests) if has_proxy else None,
        front_cores=spent.front_s / spent.seconds,
        proxy_cores=spent.proxy_s / spent.seconds,
        workers_cores=spent.workers_s / spent.seconds,
        clients_cores=clients_s / spent.seconds,
        others_cores=spent.others_cores,
        stolen_cores=spent.stolen_cores,
        is_quiet=is_quiet(spent),
    )
