"""What simulated engines answer with the demo model, and calls to one worker without a frontend."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache

from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.domain.checkpoint import read_checkpoint
from tandem.engine.simulated.tokens import Vocabulary, expected_tokens, read_vocabulary
from tandem.errors import StaleEpoch
from tandem.testing.direct_legs import DirectLegs, direct_legs
from tests.faults.support.fault_cluster import DEMO_MODEL


@cache
def _vocabulary() -> Vocabulary:
    return read_vocabulary(read_checkpoint(DEMO_MODEL))


def demo_answers(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens of an undisturbed run."""
    return expected_tokens(_vocabulary(), prompt, count)


class DirectCalls:
    """Decode legs to one worker over a step stream that is open already; use `direct_calls`."""

    def __init__(self, legs: DirectLegs) -> None:
        self._legs = legs

    async def is_refused_as_stale(self, epoch: int) -> bool:
        """Whether the worker says that this is not its start; any other failure is the caller's."""
        leg = leg_pb2.LegRequest(
            request_id=f"direct-{random.getrandbits(32):08x}",
            model=DEMO_MODEL.name,
            token_ids=[10, 11, 12],
            attempt=1,
            worker_epoch=epoch,
            sampling=sampling_pb2.Sampling(temperature=0.0),
            stopping=sampling_pb2.Stopping(max_tokens=4),
            # No peer comes to its room.
            bootstrap=leg_pb2.Bootstrap(host="127.0.0.1", port=9, room=1),
        )
        try:
            await self._legs.start(leg)
        except StaleEpoch:
            return True
        return False


@asynccontextmanager
async def direct_calls(address: str) -> AsyncIterator[DirectCalls]:
    """Calls to host:port, which must answer now."""
    async with direct_legs(address) as legs:
        calls = DirectCalls(legs)
        assert await calls.is_refused_as_stale(1), "an epoch that never was is taken"
        yield calls
