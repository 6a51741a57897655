"""The relay hop: tokens of decode become chunks for the client, and the legs' accounts become one finish.

Owns the order of the client's stream: contiguous chunk indices, text that is certain, nothing of a stop. Waits for
nothing and cancels nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import duration_pb2

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.observe.course import Course
from tandem.rpc.messages import timestamp
from tandem_frontend.detokenization import Detokenizer
from tandem_frontend.stopping import StopMatcher, StopStep, StopTokens

LEG_TIMES = ("prefill_start_time", "prefill_end_time", "kv_transfer_start_time", "kv_transfer_end_time")


class Relay:
    """One client's stream."""

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, stop_tokens: StopTokens, course: Course) -> None:
        """`course` is told of tokens, and tells their times."""
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_tokens = stop_tokens
        self._course = course
        self._next_index = 0
        self._token_count = 0
        self._matched: generation_pb2.MatchedStop | None = None

    @property
    def ends_the_legs(self) -> bool:
        """A stop has matched that the engine knows nothing of: the legs must be ended from here."""
        if self._matched is None:
            return False
        return self._matched.HasField("stop") or not self._stop_tokens.engine_stops_too

    def is_over(self) -> bool:
        """A stop has matched: the client has everything but the finish."""
        return self._matched is not None

    def take(self, tokens: leg_pb2.LegTokens) -> pb.GenerateChunk:
        """The chunk behind the next tokens; up to the stop, if one matches among them."""
        course = self._course
        now_s = course.clock()
        texts: list[str] = []
        taken = 0
        for token_id in tokens.token_ids:
            taken += 1
            self._token_count += 1
            if self._ends(token_id, texts):
                break
        course.note_tokens(now_s, taken)
        return self._chunk("".join(texts), tokens.token_ids[:taken], tokens.logprobs[:taken])

    def finish(
        self,
        prompt_tokens: int,
        decode: leg_pb2.LegFinish | None,
        prefill: leg_pb2.LegFinish | None,
        route: pb.Route,
    ) -> tuple[pb.GenerateChunk | None, pb.GenerateFinish]:
        """The text that was still held back, if any, and the end of the stream.

        Args:
            prompt_tokens: tokens of the prompt.
            decode: what the decode leg says; None when the stream was ended here, by a stop.
            prefill: what the prefill leg says; None on an aggregated route, or when it said nothing.
            route: who served it.
        """
        rest = None
        if self._matched is None:
            text = self._push(self._detokenizer.flush())
            held = text.text if text.matched is not None else text.text + self._stops.flush()
            if text.matched is not None:
                self._matched = generation_pb2.MatchedStop(stop=text.matched)
            rest = self._chunk(held, (), ()) if held else None
        finish = pb.GenerateFinish(reason=self._reason(decode), matched_stop=self._matched, route=route)
        finish.usage.prompt_tokens = prompt_tokens
        finish.usage.completion_tokens = self._token_count
        computing = prefill if prefill is not None else decode
        if computing is not None:
            # After a continuation the engine's prompt held tokens of the answer too.
            finish.usage.cached_tokens = min(computing.usage.cached_tokens, prompt_tokens)
        self._fill_timings(finish.timings, decode, prefill)
        return rest, finish

    def _ends(self, token_id: int, texts: list[str]) -> bool:
        """Add a token's text; whether it ends the generation as far as the client is concerned."""
        if self._stop_tokens.matches(token_id, self._token_count):
            # Its own text is not the client's; what was held back before it is.
            step = self._push(self._detokenizer.flush())
            texts.append(step.text if step.matched is not None else step.text + self._stops.flush())
            self._matched = generation_pb2.MatchedStop(token_id=token_id)
            return True
        step = self._push(self._detokenizer.push((token_id,)))
        texts.append(step.text)
        if step.matched is not None:
            self._matched = generation_pb2.MatchedStop(stop=step.matched)
        return step.matched is not None

    def _push(self, text: str) -> StopStep:
        """Text of the newest token, searched for stop strings; those before the least number of tokens do not count."""
        return self._stops.push(text, may_end=self._stop_tokens.may_end(self._token_count))

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
        begin_s, first_s, last_s = self._course.begin_s, self._course.first_token_s, self._course.last_token_s
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
            if leg.timings.HasField("kv_transfer_bytes"):
                timings.kv_transfer_bytes = leg.timings.kv_transfer_bytes
        if decode is not None and decode.timings.HasField("recomputed_tokens"):
            timings.recomputed_tokens = decode.timings.recomputed_tokens
        if first_s is not None and last_s is not None:
            timings.first_token_time.CopyFrom(timestamp(first_s))
            timings.last_token_time.CopyFrom(timestamp(last_s))
            waited = duration_pb2.Duration()
            waited.FromNanoseconds(int((first_s - begin_s) * 1e9))
            timings.time_to_first_token.CopyFrom(waited)
