"""What one call of a client has used, over its choices: the source of its billing line and of the tenants' metrics.

Owns the sums. It is read from the request traces when the call has ended, so that it costs nothing while tokens flow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from tandem.observability.metric_attributes import OTHER, TENANTS_MAX
from tandem.observability.metrics import Metrics
from tandem.observability.request_trace import CANCELLED, FAILED, FINISHED, REFUSED, RequestTrace

WORST_FIRST = (FAILED, REFUSED, CANCELLED, FINISHED)
"""Where choices end differently: one that fails cancels the others."""


class CallUsage:
    """Collects the generations of one call. A prompt counts once, however many choices it has, as in OpenAI's usage."""

    def __init__(self) -> None:
        self.choices_per_prompt = 1
        self._traces: list[RequestTrace] = []

    def add(self, trace: RequestTrace) -> bool:
        """A generation has begun. Returns whether it is the first one of its prompt."""
        self._traces.append(trace)
        return (len(self._traces) - 1) % self.choices_per_prompt == 0

    def summed(self) -> UsageSums:
        """The sums, after every generation has ended."""
        sums = UsageSums()
        for begin in range(0, len(self._traces), self.choices_per_prompt):
            choices = [one for one in self._traces[begin : begin + self.choices_per_prompt] if one.attempts]
            sums.prompt_tokens += max((trace.prompt_tokens for trace in choices), default=0)
            sums.cached_tokens += min((_cached(trace) for trace in choices), default=0)
            sums.completion_tokens += sum(completion_tokens(trace) for trace in choices)
        worst = min(self._traces, key=lambda trace: WORST_FIRST.index(trace.outcome), default=None)
        if worst is not None:
            sums.outcome, sums.reason = worst.outcome, worst.reason
            sums.request_id = self._traces[0].request_id
        return sums


@dataclass(slots=True)
class UsageSums:
    """What a call has used. Tokens count from the dispatch to a worker on, also where the generation ended early."""

    request_id: str = ""
    """Of its first generation; empty: it ended before."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were in a prefix cache, as far as the engines have reported it."""
    completion_tokens: int = 0
    outcome: str = REFUSED
    """As in `RequestTrace`; of several choices the worst one."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEntry:
    """A call that has ended, for those that record usage."""

    end_s: float
    """Seconds since the Unix epoch."""
    tenant: str
    call_id: str
    operation: str
    model: str
    choices: int
    sums: UsageSums

    def as_line(self) -> str:
        """One line of JSON."""
        sums = self.sums
        ended = datetime.fromtimestamp(self.end_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps(
            {
                "event": "usage",
                "time": ended,
                "tenant": self.tenant or None,
                "request_id": sums.request_id or None,
                "call_id": self.call_id or None,
                "operation": self.operation,
                "model": self.model,
                "prompt_tokens": sums.prompt_tokens,
                "cached_tokens": sums.cached_tokens,
                "completion_tokens": sums.completion_tokens,
                "choices": self.choices,
                "outcome": sums.outcome,
                "reason": sums.reason,
            },
            # A call id is the client's, and some readers end a line at U+0085 or U+2028.
            ensure_ascii=True,
        )


UsageSink = Callable[[UsageEntry], None]


class TenantMetrics:
    """Counts usage by tenant. The first tenants have a name of their own, further ones count as `other`."""

    def __init__(self, metrics: Metrics, names_max: int = TENANTS_MAX) -> None:
        self._metrics = metrics
        self._names_max = names_max
        self._names: set[str] = set()

    def __call__(self, entry: UsageEntry) -> None:
        """Count a call; one without a tenant counts nowhere."""
        if not entry.tenant:
            return
        about, sums = {"tandem.tenant": self._name(entry.tenant)}, entry.sums
        self._metrics.count("tandem.tenant.requests", attributes={**about, "tandem.outcome": sums.outcome})
        for kind, count in (
            ("prompt", sums.prompt_tokens),
            ("cached", sums.cached_tokens),
            ("completion", sums.completion_tokens),
        ):
            self._metrics.count("tandem.tenant.tokens", count, {**about, "tandem.tokens": kind})

    def refused(self, tenant: str, limit: str) -> None:
        """Count a request that a quota refused."""
        self._metrics.count(
            "tandem.tenant.refused", attributes={"tandem.tenant": self._name(tenant), "tandem.quota": limit}
        )

    def _name(self, tenant: str) -> str:
        if tenant not in self._names:
            if len(self._names) >= self._names_max:
                return OTHER
            self._names.add(tenant)
        return tenant


def completion_tokens(trace: RequestTrace) -> int:
    """Tokens that a generation has produced, whether or not it has finished."""
    return trace.completion_tokens if trace.outcome == FINISHED else trace.token_count


def _cached(trace: RequestTrace) -> int:
    if trace.outcome == FINISHED:
        return trace.cached_tokens
    return next((one.cached_tokens for one in reversed(trace.attempts) if one.cached_tokens is not None), 0)
