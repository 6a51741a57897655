"""The whole way of a request, hop by hop, from a client's message to the finish of its stream.

    validate -> admit -> wait -> route -> dispatch -> supervise -> relay -> finish
                         (again, from where it broke, when a leg fails)

Owns the order of the hops. The task of a request waits while its tokens are pushed through the relay to the client.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.errors import Overloaded
from tandem.observability.request_trace import RequestTrace
from tandem.observability.spans import is_sampled
from tandem.observability.trace_store import TraceStore
from tandem.rpc.convert import present
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.call_context import Caller
from tandem_frontend.execution.attempt import Attempt
from tandem_frontend.execution.request_stream import ExecutionDeps, RetryingStream
from tandem_frontend.execution.trace_recorder import Record, trace_of
from tandem_frontend.preparation.sampling import with_defaults
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.validation import CheckedRequest, checked_generate, naming_the_prompt
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.response.detokenizer import Detokenizer
from tandem_frontend.response.relay import Outlet, Relay
from tandem_frontend.response.stop_matching import StopMatcher, StopTokens

PROMPT_TOKENS_TOLD = 1024
"""Of a prompt in a trace, where those are wanted; collectors refuse large spans."""


class Answer(Outlet, Protocol):
    """An answer on its way to a client."""

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """The request has been taken and dispatched; comes first."""
        ...

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """The end; comes last, and once."""
        ...


class Generation:
    """Generates for clients with the workers that are alive."""

    def __init__(
        self,
        model: ServedModel,
        admission: Admission,
        attempts: ExecutionDeps,
        traces: TraceStore[RequestTrace] | None = None,
        coalescing: Coalescing | None = None,
        *,
        tells_prompts: bool = False,
    ) -> None:
        """`traces` keeps what happened to each request, and its prompt if so wanted; None: nothing is kept."""
        self._tells_prompts = tells_prompts
        self._model = model
        self._admission = admission
        self._attempts = attempts
        self._traces: TraceStore[RequestTrace] = traces or TraceStore()
        self._coalescing = coalescing or Coalescing()

    async def generate(self, request: pb.GenerateRequest, caller: Caller, answer: Answer) -> None:
        """Generate into an answer: accepted, chunks, exactly one finish.

        Cancelling this, at whatever point, ends both legs in their engines.

        Args:
            request: as the client sent it.
            caller: who asks, and until when.
            answer: where it goes. Chunks are pushed from here on until the finish, whatever this task does.

        Raises:
            TandemError: the one ending of an answer without a finish.
        """
        with (
            self._traces.following(trace_of(request, caller, self._model.name)) as record,
            self._admitted(record) as recorder,
        ):
            self._model.check_name(present(request, "model", request.model))
            wanted = await checked_generate(request, self._model.tokenizer)
            recorder.checked(wanted)
            if self._tells_prompts and self._traces.ids is not None and is_sampled(record):
                record.prompt = await self._told_prompt(wanted)
            relay = self._relay(wanted, record, answer)
            async with self._served(wanted, caller, relay, recorder) as stream:
                answer.accepted(self._accepted(wanted, stream.attempt))
                relay.open(stream.give_up)
                await stream.run()
                if relay.is_overrun:
                    raise Overloaded("the client does not read its answer: too much of it waits")
                route, prefill = _route(stream.attempt), stream.attempt.prefill_finish
                finish = relay.finish(len(wanted.token_ids), stream.finish(), prefill, route)
            # Both legs have ended here: a client that has the finish may rely on it.
            recorder.finish(finish)
            await answer.finish(finish)

    async def _told_prompt(self, wanted: CheckedRequest) -> str:
        """What the model reads, as far as it is told."""
        ids = wanted.token_ids[:PROMPT_TOKENS_TOLD]
        return await self._model.tokenizer.decode_all(ids, skip_special_tokens=False)

    @contextlib.contextmanager
    def _admitted(self, trace: RequestTrace) -> Iterator[Record]:
        record = Record(trace, self._traces.child)
        record.arrive()
        with self._admission.admit():
            record.step("admit")
            yield record

    @contextlib.asynccontextmanager
    async def _served(
        self, wanted: CheckedRequest, caller: Caller, relay: Relay, record: Record
    ) -> AsyncIterator[RetryingStream]:
        async with self._admission.slot(_queued(wanted, caller)):
            record.step("wait")
            with naming_the_prompt(wanted.prompt_field):
                async with self._attempts.accepted(self._leg(wanted), relay, caller.left_s(), record) as stream:
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

    def _relay(self, wanted: CheckedRequest, record: RequestTrace, answer: Answer) -> Relay:
        tokenizer = self._model.tokenizer
        stop_tokens = StopTokens(
            wanted.stop_token_ids, tokenizer.eos_token_ids, wanted.min_tokens or 0, ignore_eos=wanted.ignore_eos
        )
        detokenizer = Detokenizer(tokenizer, wanted.token_ids, skip_special_tokens=wanted.skip_special_tokens)
        matcher = StopMatcher(wanted.stop)
        return Relay(detokenizer, matcher, stop_tokens, record, answer, self._coalescing, wanted.coalesce_s)

    def _accepted(self, wanted: CheckedRequest, attempt: Attempt) -> pb.GenerateAccepted:
        return pb.GenerateAccepted(
            request_id=wanted.request_id,
            model=self._model.name,
            prompt_tokens=len(wanted.token_ids),
            route=_route(attempt),
        )


def _queued(wanted: CheckedRequest, caller: Caller) -> QueuedRequest:
    """The KV it may hold, counted when it is asked for: what it really needs is known only at its end."""
    return QueuedRequest(
        tokens=len(wanted.token_ids) + wanted.max_tokens,
        answer_tokens=wanted.max_tokens,
        priority=wanted.priority or 0,
        tenant=caller.tenant,
        deadline_s=caller.deadline_s,
    )


def _route(attempt: Attempt) -> pb.Route:
    prefill, dispatched = attempt.route.prefill, attempt.dispatched
    return pb.Route(
        attempt=dispatched.attempt,
        prefill_worker_id=prefill.worker_id if prefill else "",
        decode_worker_id=attempt.route.decode.worker_id,
        bootstrap_room=dispatched.room,
    )
