"""Log probabilities of a step message: assigns them to their legs and checks them against the legs' tokens.

A client must get as many as it gets tokens, for token ids of the vocabulary, with values that JSON can express.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tandem.api.types.v1 import generation_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem_frontend.execution.link_leg import Logprobs


def by_leg(
    message: StreamStepsResponse, numbers: Sequence[int], counts: Sequence[int]
) -> tuple[dict[int, Iterator[generation_pb2.TokenLogprob]], dict[int, str]]:
    """The log probabilities of each leg in order, over all steps of the message.

    Returns:
        Those of each leg by its number, and an error text for each leg that has not as many as it has tokens.
    """
    found: dict[int, list[generation_pb2.TokenLogprob]] = {}
    for entry in message.logprobs:
        found.setdefault(entry.leg, []).extend(entry.logprobs)
    token_counts = dict.fromkeys(found, 0)
    for number, count in zip(numbers, counts, strict=True):
        if number in token_counts:
            token_counts[number] += count
    misfits = {
        number: f"received {len(entries)} log probabilities with {token_counts[number]} tokens"
        for number, entries in found.items()
        if len(entries) != token_counts[number]
    }
    return {number: iter(entries) for number, entries in found.items()}, misfits


def fault_in(logprobs: Logprobs, token_ids_below: int) -> str | None:
    """Why these cannot be sent to a client; None when they can. Minus infinity is allowed."""
    for entry in logprobs:
        tokens: tuple[generation_pb2.TokenLogprob | generation_pb2.RankedToken, ...] = (entry, *entry.top)
        for token in tokens:
            if not 0 <= token.token_id < token_ids_below:
                return f"a log probability is for token {token.token_id}, outside the vocabulary of {token_ids_below}"
            if not token.logprob < math.inf:
                return f"the log probability of token {token.token_id} is {token.logprob}"
    return None
