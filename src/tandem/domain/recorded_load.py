"""What a cluster has seen of its load: its workers, and its last requests with their lengths and times. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.domain.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRequest:
    """One request. Times are seconds since the Unix epoch; None: not known, or not come.

    All are on the frontend's clock, except those of the prompt.
    """

    begin_s: float
    """Its arrival."""
    is_finished: bool
    """Whether it had its whole answer."""
    prompt_tokens: int | None = None
    answer_tokens: int = 0
    """So far."""
    cached_tokens: int = 0
    """Prompt tokens in the cache of the worker that computed it."""
    queue_s: float | None = None
    """Wait in the frontend's queue."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    computed_by: str = ""
    """Worker that computed the prompt; empty: none yet."""
    prompt_begin_s: float | None = None
    """On that worker's clock."""
    prompt_end_s: float | None = None
    generated_by: str = ""
    """Worker that generates; empty: none yet."""
    transfer_s: float | None = None
    """Time of its KV transfer."""
    transfer_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedFrontend:
    """The figures that one frontend reports of itself."""

    name: str
    open_requests: int
    waiting_requests: int
    ttft_s: tuple[float, float] | None = None
    """Median and 99th percentile in its window; None: no first token in it."""
    itl_s: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCluster:
    """A cluster at one moment, and its last requests."""

    model: str
    workers: tuple[Worker, ...]
    """Those that serve, not those that drain."""
    frontends: tuple[RecordedFrontend, ...]
    waiting_prompts: int
    """In the engines, as their load reports say."""
    window_s: float
    """How far back requests were read."""
    requests: tuple[RecordedRequest, ...] = field(default=())
    """In the order of arrival. Requests that were wrong themselves are left out: no fleet would serve them."""
    missed_count: int = 0
    """Requests that ended while the cluster was observed, and were evicted before they were read."""
