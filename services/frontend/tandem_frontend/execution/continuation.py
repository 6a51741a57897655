"""What a broken stream goes on with: the leg that begins where the client's tokens end, or why there can be none.

Pure. A continuation is the same request with a longer prompt, so it is allowed where the prompt is all the state there
is: not inside a grammar, whose place in a structure is lost, and not with penalties, which engines count over tokens
that they drew themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.api.types.v1 import leg_pb2
from tandem.domain.sampling import PENALTIES


def refusal_reason(leg: leg_pb2.LegRequest) -> str | None:
    """Why a stream with tokens of this request cannot go on elsewhere, as one word of the contract; None if it can."""
    if leg.HasField("guided"):
        return "guided"
    for name, neutral in PENALTIES.items():
        if leg.sampling.HasField(name) and getattr(leg.sampling, name) != neutral:  # type: ignore[arg-type]
            return "penalties"
    return None


def continued(leg: leg_pb2.LegRequest, sent: Sequence[int]) -> leg_pb2.LegRequest:
    """The request after the tokens the client has: they join the prompt, and count against what may still come.

    A seed stays as it is: a seeded draw depends on the place in the sequence, which stays the same.
    """
    rest = leg_pb2.LegRequest()
    rest.CopyFrom(leg)
    rest.token_ids.extend(sent)
    rest.stopping.max_tokens = leg.stopping.max_tokens - len(sent)
    assert rest.stopping.max_tokens > 0, "a stream that has all its tokens needs no continuation"
    if leg.stopping.HasField("min_tokens"):
        rest.stopping.min_tokens = max(0, leg.stopping.min_tokens - len(sent))
    return rest
