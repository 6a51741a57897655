"""The whole way of a request, hop by hop, from a client's message to the finish of its stream.

    validate -> admit -> wait -> route -> dispatch -> supervise -> relay -> finish
                         (again, from where it broke, when a leg fails)

Owns the order of the hops. Leaving `generate` early, at whatever point, ends both legs in their engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.observe.course import Course
from tandem.observe.courses import Courses
from tandem.observe.spans import is_sampled
from tandem.rpc.messages import present
from tandem_frontend.admission import Admission
from tandem_frontend.attempts import Attempts, RequestStream
from tandem_frontend.caller import Caller
from tandem_frontend.detokenization import Detokenizer
from tandem_frontend.dispatch import Dispatched
from tandem_frontend.model_defaults import with_defaults
from tandem_frontend.models import ServedModel
from tandem_frontend.record import Record, course_of
from tandem_frontend.relay import Relay
from tandem_frontend.stopping import StopMatcher, StopTokens
from tandem_frontend.validation import CheckedRequest, checked_generate, naming_the_prompt
from tandem_frontend.waiting_line import Demand

PROMPT_TOKENS_TOLD = 1024
"""Of a prompt in a trace, where those are wanted; collectors refuse large spans."""
Event = pb.GenerateAccepted | pb.GenerateChunk | pb.GenerateFinish


class Generation:
    """Generates for clients with the workers that are alive."""

    def __init__(
        self,
        model: ServedModel,
        admission: Admission,
        attempts: Attempts,
        courses: Courses[Course] | None = None,
        *,
        tells_prompts: bool = False,
    ) -> None:
        """`courses` is told of every request, and of its prompt if so wanted; None: nobody wants to know."""
        self._tells_prompts = tells_prompts
        self._model = model
        self._admission = admission
        self._attempts = attempts
        self._courses: Courses[Course] = courses or Courses()

    async def generate(self, request: pb.GenerateRequest, caller: Caller) -> AsyncGenerator[Event, None]:
        """Stream a generation: accepted, chunks, exactly one finish.

        Args:
            request: as the client sent it.
            caller: who asks, and until when.

        Raises:
            TandemError: the one ending of a stream without a finish.
        """
        with (
            self._courses.following(course_of(request, caller, self._model.name)) as course,
            self._admitted(course) as record,
        ):
            self._model.check_name(present(request, "model", request.model))
            wanted = await checked_generate(request, self._model.tokenizer)
            record.checked(wanted)
            if self._tells_prompts and self._courses.ids is not None and is_sampled(course):
                course.prompt = await self._told_prompt(wanted)
            relay = self._relay(wanted, course)
            async with self._served(wanted, caller, record) as stream:
                yield self._accepted(wanted, stream.attempt.dispatched)
                async with contextlib.aclosing(stream.tokens(relay.is_over)) as batches:
                    async for tokens in batches:
                        yield relay.take(tokens)
                        if relay.ends_the_legs:
                            break
                route, prefill = _route(stream.attempt.dispatched), stream.attempt.prefill_finish
                rest, finish = relay.finish(len(wanted.token_ids), stream.finish(), prefill, route)
            # Both legs have ended here: a client that has the finish may rely on it.
            record.finish(finish)
            if rest is not None:
                yield rest
            yield finish

    async def _told_prompt(self, wanted: CheckedRequest) -> str:
        """What the model reads, as far as it is told."""
        ids = wanted.token_ids[:PROMPT_TOKENS_TOLD]
        return await self._model.tokenizer.decode_all(ids, skip_special_tokens=False)

    @contextlib.contextmanager
    def _admitted(self, course: Course) -> Iterator[Record]:
        record = Record(course, self._courses.child)
        record.arrive()
        with self._admission.admit():
            record.step("admit")
            yield record

    @contextlib.asynccontextmanager
    async def _served(self, wanted: CheckedRequest, caller: Caller, record: Record) -> AsyncIterator[RequestStream]:
        async with self._admission.place(_demand(wanted, caller)):
            record.step("wait")
            with naming_the_prompt(wanted.prompt_field):
                async with self._attempts.taken(self._leg(wanted), caller.left_s(), record) as stream:
                    yield stream

    def _leg(self, wanted: CheckedRequest) -> leg_pb2.LegRequest:
        """What both legs share."""
        return leg_pb2.LegRequest(
            request_id=wanted.request_id,
            model=self._model.name,
            token_ids=wanted.token_ids,
            sampling=with_defaults(wanted.sampling, self._model.sampling_defaults),
            stopping=sampling_pb2.Stopping(
                max_tokens=wanted.max_tokens,
                min_tokens=wanted.min_tokens,
                stop_token_ids=wanted.stop_token_ids,
                ignore_eos=wanted.ignore_eos,
            ),
            guided=wanted.guided,
            logprobs=wanted.logprobs,
            priority=wanted.priority,
            cache_salt=wanted.cache_salt,
        )

    def _relay(self, wanted: CheckedRequest, course: Course) -> Relay:
        tokenizer = self._model.tokenizer
        stop_tokens = StopTokens(
            wanted.stop_token_ids, tokenizer.eos_token_ids, wanted.min_tokens or 0, ignore_eos=wanted.ignore_eos
        )
        detokenizer = Detokenizer(tokenizer, wanted.token_ids, skip_special_tokens=wanted.skip_special_tokens)
        return Relay(detokenizer, StopMatcher(wanted.stop), stop_tokens, course)

    def _accepted(self, wanted: CheckedRequest, dispatched: Dispatched) -> pb.GenerateAccepted:
        return pb.GenerateAccepted(
            request_id=wanted.request_id,
            model=self._model.name,
            prompt_tokens=len(wanted.token_ids),
            route=_route(dispatched),
        )


def _demand(wanted: CheckedRequest, caller: Caller) -> Demand:
    """The KV it may hold, counted when it is asked for: what it really needs is known only at its end."""
    return Demand(
        tokens=len(wanted.token_ids) + wanted.max_tokens,
        answer_tokens=wanted.max_tokens,
        priority=wanted.priority or 0,
        tenant=caller.tenant,
        deadline_s=caller.deadline_s,
    )


def _route(dispatched: Dispatched) -> pb.Route:
    prefill = dispatched.route.prefill
    return pb.Route(
        attempt=dispatched.attempt,
        prefill_worker_id=prefill.worker_id if prefill else "",
        decode_worker_id=dispatched.route.decode.worker_id,
        bootstrap_room=dispatched.room,
    )
