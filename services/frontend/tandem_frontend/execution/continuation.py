"""Continuation of a failed stream: the leg that starts after the client's last token, or why there can be none.

Pure; `request_stream` adds the two reasons that are not of the request: too many failures, and no worker left. A
continuation is the same request with a longer prompt. So it is allowed only where the prompt is all the state
there is: not with a grammar, whose state would be lost, and not with penalties, which engines count over the tokens
that they sampled themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.api.types.v1 import leg_pb2
from tandem.domain.sampling import PENALTIES


def refusal_reason(leg: leg_pb2.LegRequest) -> str | None:
    """Why a stream that has produced tokens cannot be continued, as one word of the contract; None if it can."""
    if leg.HasField("guided"):
        return "guided"
    for name, neutral in PENALTIES.items():
        if leg.sampling.HasField(name) and getattr(leg.sampling, name) != neutral:  # type: ignore[arg-type]
            return "penalties"
    return None


def continued(leg: leg_pb2.LegRequest, sent: Sequence[int]) -> leg_pb2.LegRequest:
    """The request with the tokens that the client has: appended to the prompt, subtracted from max and min tokens.

    The seed stays as it is: a seeded sample depends on the position in the sequence, which does not change.
    """
    rest = leg_pb2.LegRequest()
    rest.CopyFrom(leg)
    rest.token_ids.extend(sent)
    rest.stopping.max_tokens = leg.stopping.max_tokens - len(sent)
    assert rest.stopping.max_tokens > 0, "a stream that has all its tokens needs no continuation"
    if leg.stopping.HasField("min_tokens"):
        rest.stopping.min_tokens = max(0, leg.stopping.min_tokens - len(sent))
    return rest
