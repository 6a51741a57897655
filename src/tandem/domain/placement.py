"""Why a request went to a pair or to an aggregated worker, where workers of both kinds serve its model."""

from __future__ import annotations

from enum import Enum


class Placement(Enum):
    """The reasons, in the words of the contracts."""

    SHORT_PROMPT = "short_prompt"
    """Aggregated: the part of the prompt that is not cached there is short."""
    PREFILL_WAIT = "prefill_wait"
    """Aggregated: it has computed the prompt before a prefill worker would begin it."""
    NO_PAIR = "no_pair"
    """Aggregated: no pair is left, or it is avoided."""
    LONG_PROMPT = "long_prompt"
    """Pair: the prompt is not short, and a prefill worker begins it soon enough."""
    PROMPT_SHARE = "prompt_share"
    """Pair: the aggregated worker has given prompts their share of its time."""
    STREAMS = "streams"
    """Pair: the aggregated worker has no place for another stream, or streams much more than the decode worker."""
    LOAD_UNKNOWN = "load_unknown"
    """Pair: the aggregated worker has no current load report."""
    NO_AGGREGATED = "no_aggregated"
    """Pair: no aggregated worker is left, or it is avoided."""

    @property
    def is_local(self) -> bool:
        """Whether an aggregated worker serves the request."""
        return self in (Placement.SHORT_PROMPT, Placement.PREFILL_WAIT, Placement.NO_PAIR)
