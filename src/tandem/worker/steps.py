"""Step streams: what the legs of one frontend have to say, packed into one message for each step of the engine.

Owns the order and the bounds of what waits to be sent. Legs put their tokens and ends in; the call that the frontend
keeps open takes them out, all that has gathered since its last message. Knows no engine: what a stream's end means for
its legs is `legs`' business.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from google.rpc import status_pb2

from tandem.api.types.v1 import leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.domain.generation import TokenLogprob
from tandem.errors import ServiceError
from tandem.rpc.convert import logprob_to_proto

log = logging.getLogger(__name__)

ALIVE_S = 0.2
"""How often silent legs are named: each one within two of these, as the contract promises."""
WAITING_TOKENS_MAX = 256 * 1024
"""Most tokens that wait for a frontend that does not read; one with log probabilities, and an end, count as several."""
LOGPROB_TOKENS = 8
"""What a token with log probabilities counts for, and each of its rivals once more."""
END_TOKENS = 4
"""What the end of a leg counts for, and each END_BYTES of it once more."""
END_BYTES = 32


class StepStream:
    """The stream to one frontend."""

    def __init__(self, stream_id: int, frontend_id: str, on_overflow: Callable[[], object]) -> None:
        """`on_overflow` is called when the frontend has let too much gather; it must close the stream."""
        self.stream_id = stream_id
        self.frontend_id = frontend_id
        self._on_overflow = on_overflow
        self._message = StreamStepsResponse(stream_id=stream_id)
        self._has_message = True
        self._legs: list[int] = []
        self._indices: list[int] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []
        self._waiting_tokens = 0
        self._open: dict[int, None] = {}
        """Legs that have been taken and have not ended, in the order of their starts."""
        self._spoken: set[int] = set()
        """Legs named since silence was last checked."""
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will be sent."""
        return self._is_closed

    def open_leg(self, leg: int) -> None:
        """A leg has been taken: from now on it is named regularly."""
        self._open[leg] = None
        self._spoken.add(leg)
        if self._timer is None:
            self._name_later()

    def drop_leg(self, leg: int) -> None:
        """A leg was refused after all: it is not named any more."""
        self._open.pop(leg, None)

    def tokens(self, leg: int, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """The next tokens of a leg; `index` is the place of the first one. On the hot path: once a leg and step."""
        if self._is_closed:
            return
        count = len(token_ids)
        self._legs.append(leg)
        self._indices.append(index)
        self._counts.append(count)
        self._token_ids += token_ids
        self._spoken.add(leg)
        self._waiting_tokens += count
        if logprobs:
            self._add_logprobs(leg, logprobs)
        if self._waiting_tokens > WAITING_TOKENS_MAX:
            self._on_overflow()
        elif self._waiter is not None:
            self._wake()

    def finish(self, leg: int, finish: leg_pb2.LegFinish) -> None:
        """The end of a leg, by itself or by an abort."""
        self._end(leg, leg2_pb2.LegEnd(leg=leg, finish=finish))

    def fail(self, leg: int, failure: status_pb2.Status) -> None:
        """The end of a leg that failed."""
        self._end(leg, leg2_pb2.LegEnd(leg=leg, failure=failure))

    async def messages(self) -> AsyncGenerator[StreamStepsResponse, None]:
        """Each message when there is something to say, without end; first the stream's number.

        Raises:
            ServiceError: the worker has closed the stream.
        """
        while True:
            while not (self._has_message or self._legs):
                self._check_open()
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            yield self._take()

    def close(self, *, sends_rest: bool = False) -> None:
        """Add nothing more. `sends_rest`: what waits is still sent; the end of a leg may be among it."""
        if not self._is_closed:
            self._is_closed = True
            if self._timer is not None:
                self._timer.cancel()
            if not sends_rest:
                self._take()
            self._wake()

    def _take(self) -> StreamStepsResponse:
        """All that waits, as one message."""
        message, self._message, self._has_message = self._message, StreamStepsResponse(), False
        if self._legs:
            message.legs.extend(self._legs)
            message.indices.extend(self._indices)
            # The number of tokens does not show it: a leg with two and a leg with none are two legs with two tokens.
            if self._counts.count(1) != len(self._counts):
                message.counts.extend(self._counts)
            message.token_ids.extend(self._token_ids)
            self._legs, self._indices, self._counts, self._token_ids = [], [], [], []
        self._waiting_tokens = 0
        return message

    def _add_logprobs(self, leg: int, logprobs: Sequence[TokenLogprob]) -> None:
        entry = self._message.logprobs.add(leg=leg)
        entry.logprobs.extend(map(logprob_to_proto, logprobs))
        self._waiting_tokens += sum(LOGPROB_TOKENS + len(logprob.top) for logprob in logprobs)
        self._has_message = True

    def _end(self, leg: int, end: leg2_pb2.LegEnd) -> None:
        self._open.pop(leg, None)
        if not self._is_closed:
            self._message.ends.append(end)
            self._has_message = True
            self._waiting_tokens += END_TOKENS + end.ByteSize() // END_BYTES
            if self._waiting_tokens > WAITING_TOKENS_MAX:
                self._on_overflow()
            else:
                self._wake()

    def _name_the_silent(self) -> None:
        silent = [leg for leg in self._open if leg not in self._spoken]
        self._spoken.clear()
        if silent:
            # A reader that is stuck for long needs each name once.
            del self._message.alive[:]
            self._message.alive.extend(silent)
            self._has_message = True
            self._wake()
        if self._open:
            self._name_later()
        else:
            self._timer = None

    def _name_later(self) -> None:
        # On the real clock, unlike bounds on others' silence: a loop that lags must speak as soon as it can.
        self._timer = asyncio.get_running_loop().call_later(ALIVE_S, self._name_the_silent)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ServiceError("this step stream was closed by the worker")


class StepStreams:
    """The step streams of one worker, by their numbers."""

    def __init__(self, on_close: Callable[[StepStream], None]) -> None:
        """`on_close` is called for a stream that has ended, from either side: its legs must end."""
        self._on_close = on_close
        self._by_id: dict[int, StepStream] = {}
        self._ids = itertools.count(1)

    def open(self, frontend_id: str, on_overflow: Callable[[], object]) -> StepStream:
        """A new stream; `on_overflow` must end the call that reads it, when the frontend has let too much gather."""
        stream_id = next(self._ids)

        def overflow() -> None:
            log.error(
                "frontend %s does not read its step stream (%d tokens wait): its legs are aborted",
                frontend_id, WAITING_TOKENS_MAX,
            )  # fmt: skip
            self.close(stream)
            on_overflow()

        stream = self._by_id[stream_id] = StepStream(stream_id, frontend_id, overflow)
        return stream

    def get(self, stream_id: int) -> StepStream:
        """An open stream.

        Raises:
            ServiceError: there is none of that number.
        """
        stream = self._by_id.get(stream_id)
        if stream is None:
            raise ServiceError(f"step stream {stream_id} is not open here: it has ended, or the worker has restarted")
        return stream

    def close(self, stream: StepStream, *, sends_rest: bool = False) -> None:
        """The end of a stream. May be called twice."""
        if self._by_id.pop(stream.stream_id, None) is not None:
            stream.close(sends_rest=sends_rest)
            self._on_close(stream)

    def close_all(self) -> None:
        """End every stream, and with it the legs on it, after what waits has been sent."""
        for stream in list(self._by_id.values()):
            self.close(stream, sends_rest=True)
