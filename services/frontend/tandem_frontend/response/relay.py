"""The relay hop: tokens of decode become chunks for the client, and the legs' accounts become one finish.

Owns the order of the client's stream: contiguous chunk indices, text that is certain, nothing of a stop, the same text
however it is cut. Waits for nothing and cancels nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from google.protobuf import duration_pb2

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.observability.request_trace import RequestTrace, kv_transfer_bytes
from tandem.rpc.convert import timestamp
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.response.detokenizer import Detokenizer
from tandem_frontend.response.stop_matching import StopMatcher, StopStep, StopTokens

UNREAD_TOKENS_MAX = 16_384
"""Most tokens that are kept for a client that does not read, about 100 bytes each; one with log probabilities counts as
several."""
LOGPROB_TOKENS = 8
"""What a token with log probabilities counts for, and each of its rivals once more."""
LEG_TIMES = ("prefill_start_time", "prefill_end_time", "kv_transfer_start_time", "kv_transfer_end_time")


class Outlet(Protocol):
    """Where a client's chunks go: one for each form in which answers leave."""

    @property
    def is_writable(self) -> bool:
        """False while the client does not read what it already has; `on_writable` is called when it does again."""
        ...

    def on_writable(self, callback: Callable[[], None]) -> None:
        """Who is called each time it becomes writable again."""
        ...

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """The next chunk; never blocks, and is asked for at any time."""
        ...


class Relay:
    """One client's stream. Tokens are pushed in; chunks are pushed on, as many as the process has time for."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        stop_tokens: StopTokens,
        record: RequestTrace,
        outlet: Outlet,
        coalescing: Coalescing,
        hold_max_s: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Nothing leaves before `open`.

        Args:
            detokenizer: makes text of the tokens.
            stops: stop strings.
            stop_tokens: tokens that end the generation.
            record: counts the tokens, and knows their times.
            outlet: where chunks go.
            coalescing: how busy the process is.
            hold_max_s: the request's own bound on how long a chunk is held; None: the process's.
            loop: whose clock counts; None: the running one's.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_tokens = stop_tokens
        self._record = record
        self._outlet = outlet
        self._coalescing = coalescing
        self._hold_max_s = coalescing.hold_max_s if hold_max_s is None else hold_max_s
        self._next_index = 0
        self._matched: generation_pb2.MatchedStop | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[generation_pb2.TokenLogprob] = []
        """What waits for its chunk."""
        self._on_defect: Callable[[Exception], None] | None = None
        self._is_open = False
        self._is_held = False
        self._loop = loop or asyncio.get_running_loop()
        self._flushed_s = 0.0
        self.due_s = 0.0
        """See `coalescing.Held`."""
        self.is_overrun = False
        """The client has let so much gather that nothing more is kept for it."""

    @property
    def ends_the_legs(self) -> bool:
        """A stop has matched that the engine knows nothing of, or the client does not read: legs must be ended here."""
        if self._matched is None:
            return self.is_overrun
        return self._matched.HasField("stop") or not self._stop_tokens.engine_stops_too

    @property
    def is_over(self) -> bool:
        """A stop has matched: the client has everything but the finish."""
        return self._matched is not None

    def open(self, on_defect: Callable[[Exception], None] | None = None) -> None:
        """Let chunks leave. `on_defect` is called when one that was held cannot; it must end the request."""
        self._is_open = True
        self._on_defect = on_defect
        self._outlet.on_writable(self.flush)
        self._send()

    def take(self, token_ids: Sequence[int], logprobs: Sequence[generation_pb2.TokenLogprob]) -> None:
        """The next tokens; up to the stop, if one matches among them. On the hot path: once a request and step."""
        if self._matched is not None:
            return
        record = self._record
        now_s = record.clock()
        taken, texts = 0, self._texts
        for token_id in token_ids:
            taken += 1
            if self._ends(token_id, record.token_count + taken, texts):
                break
        record.note_tokens(now_s, taken)
        self._token_ids += token_ids[:taken]
        if logprobs:
            self._logprobs += logprobs[:taken]
        self._offer()

    def flush(self) -> None:
        """Send what waits, if anything does and the client reads. Called from outside of the request's own turns."""
        try:
            self._send()
        except Exception as problem:
            if self._on_defect is None:
                raise
            self._on_defect(problem)

    def finish(
        self,
        prompt_tokens: int,
        decode: leg_pb2.LegFinish | None,
        prefill: leg_pb2.LegFinish | None,
        route: pb.Route,
    ) -> pb.GenerateFinish:
        """The end of the stream; all text that was still held back has gone to the outlet.

        Args:
            prompt_tokens: tokens of the prompt.
            decode: what the decode leg says; None when the stream was ended here, by a stop.
            prefill: what the prefill leg says; None on an aggregated route, or when it said nothing.
            route: who served it.
        """
        if self._matched is None:
            text = self._push(self._detokenizer.flush(), self._record.token_count)
            if text.matched is not None:
                self._matched = generation_pb2.MatchedStop(stop=text.matched)
            self._texts.append(text.text if text.matched is not None else text.text + self._stops.flush())
        held = "".join(self._texts)
        if held or self._token_ids:
            self._outlet.chunk(self._chunk(held, self._token_ids, self._logprobs))
            self._texts, self._token_ids, self._logprobs = [], [], []
        finish = pb.GenerateFinish(reason=self._reason(decode), matched_stop=self._matched, route=route)
        finish.usage.prompt_tokens = prompt_tokens
        finish.usage.completion_tokens = self._record.token_count
        computing = prefill if prefill is not None else decode
        if computing is not None:
            # After a continuation the engine's prompt held tokens of the answer too.
            finish.usage.cached_tokens = min(computing.usage.cached_tokens, prompt_tokens)
        self._fill_timings(finish.timings, decode, prefill)
        return finish

    def _send(self) -> None:
        self._is_held = False
        if not self._token_ids or not self._is_open or not self._outlet.is_writable:
            return
        texts, token_ids, logprobs = self._texts, self._token_ids, self._logprobs
        self._texts, self._token_ids, self._logprobs = [], [], []
        self._flushed_s = self._loop.time()
        self._outlet.chunk(self._chunk("".join(texts), token_ids, logprobs))

    def _offer(self) -> None:
        """Send what waits now, or have it sent when it has waited long enough."""
        if self._is_held or not self._is_open:
            pass
        elif not self._outlet.is_writable:
            if self._waiting_tokens() > UNREAD_TOKENS_MAX:
                self.is_overrun = True
        else:
            # The first token never waits, and a stream that is slower than the bound does not either.
            self.due_s = self._flushed_s + self._coalescing.pressure * self._hold_max_s
            if self.due_s <= self._loop.time():
                self._send()
            else:
                self._is_held = True
                self._coalescing.hold(self)

    def _waiting_tokens(self) -> int:
        count = len(self._token_ids)
        return count * LOGPROB_TOKENS * (1 + len(self._logprobs[0].top)) if self._logprobs else count

    def _ends(self, token_id: int, count: int, texts: list[str]) -> bool:
        """Add a token's text; whether it ends the generation as far as the client is concerned. `count` includes it."""
        if self._stop_tokens.matches(token_id, count):
            # Its own text is not the client's; what was held back before it is.
            step = self._push(self._detokenizer.flush(), count)
            texts.append(step.text if step.matched is not None else step.text + self._stops.flush())
            self._matched = generation_pb2.MatchedStop(token_id=token_id)
            return True
        step = self._push(self._detokenizer.push((token_id,)), count)
        texts.append(step.text)
        if step.matched is not None:
            self._matched = generation_pb2.MatchedStop(stop=step.matched)
        return step.matched is not None

    def _push(self, text: str, count: int) -> StopStep:
        """Text of the newest token, searched for stop strings; those before the least number of tokens do not count."""
        return self._stops.push(text, may_end=self._stop_tokens.may_end(count))

    def _chunk(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[generation_pb2.TokenLogprob]
    ) -> pb.GenerateChunk:
        chunk = pb.GenerateChunk(index=self._next_index, text=text, token_ids=token_ids, logprobs=logprobs)
        self._next_index += 1
        return chunk

    def _reason(self, decode: leg_pb2.LegFinish | None) -> generation_pb2.FinishReason.ValueType:
        if self._matched is not None or decode is None:
            return generation_pb2.FINISH_REASON_STOP
        return decode.reason

    def _fill_timings(
        self, timings: generation_pb2.Timings, decode: leg_pb2.LegFinish | None, prefill: leg_pb2.LegFinish | None
    ) -> None:
        begin_s, first_s, last_s = self._record.begin_s, self._record.first_token_s, self._record.last_token_s
        timings.accepted_time.CopyFrom(timestamp(begin_s))
        for leg in (prefill, decode):
            if leg is None:
                continue
            # Of a transfer both legs may tell. Its end is decode's to say, because there it has arrived; its start is
            # prefill's, who writes. A decode engine may not know it.
            for name in LEG_TIMES:
                told = name == "kv_transfer_start_time" and timings.HasField("kv_transfer_start_time")
                if leg.timings.HasField(name) and not told:  # type: ignore[arg-type]
                    getattr(timings, name).CopyFrom(getattr(leg.timings, name))
        moved_bytes = kv_transfer_bytes(prefill, decode)
        if moved_bytes is not None:
            timings.kv_transfer_bytes = moved_bytes
        if decode is not None and decode.timings.HasField("recomputed_tokens"):
            timings.recomputed_tokens = decode.timings.recomputed_tokens
        if first_s is not None and last_s is not None:
            timings.first_token_time.CopyFrom(timestamp(first_s))
            timings.last_token_time.CopyFrom(timestamp(last_s))
            waited = duration_pb2.Duration()
            waited.FromNanoseconds(int((first_s - begin_s) * 1e9))
            timings.time_to_first_token.CopyFrom(waited)
