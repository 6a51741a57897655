"""The pipeline of a model's requests: its stages in order, from a client's message to the finish of its stream.

    admit -> validate and tokenise -> wait in the queue -> route -> dispatch -> supervise -> finish
                                                           (retried or continued when a leg fails)

A request is admitted before it is validated, so that an overloaded frontend rejects it without tokenising its prompt.
Tokens do not pass through this task: the links push them through the relay to the client while it waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import leg_pb2, sampling_pb2, worker_pb2
from tandem.errors import LegFailed, NotSupported, Overloaded
from tandem.observability.request_trace import RequestTrace
from tandem.observability.spans import is_sampled
from tandem.observability.trace_store import TraceStore
from tandem.rpc.convert import placement_to_proto
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.call_context import Caller
from tandem_frontend.call_usage import completion_tokens
from tandem_frontend.execution.attempt import Attempt
from tandem_frontend.execution.request_stream import ExecutionDeps, RetryingStream
from tandem_frontend.execution.step_logprobs import fault_in
from tandem_frontend.execution.trace_recorder import Record, trace_of
from tandem_frontend.preparation.cache_salt import cache_salt
from tandem_frontend.preparation.sampling import with_defaults
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.validation import PRIORITY_MAX, CheckedRequest, checked_generate, naming_the_prompt
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.response.detokenizer import Detokenizer
from tandem_frontend.response.relay import UNREAD_TOKENS_MAX, Outlet, Relay
from tandem_frontend.response.stop_matching import StopMatcher, StopTokens
from tandem_frontend.response.writers import ClientCall
from tandem_frontend.routing.policy import RoutingRequest
from tandem_frontend.tenancy import Tenancy

TRACED_PROMPT_TOKENS_MAX = 1024
"""Tokens of a prompt in a trace, with --trace-prompts; collectors refuse large spans."""


class Answer(Outlet, Protocol):
    """A response that is being sent to a client."""

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """The workers have accepted the request. Called first, and once."""
        ...

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """The end of the generation. Called last, and once."""
        ...


class Generation:
    """Runs the requests of one model through the pipeline."""

    def __init__(
        self,
        model: ServedModel,
        admission: Admission,
        attempts: ExecutionDeps,
        traces: TraceStore[RequestTrace] | None = None,
        coalescing: Coalescing | None = None,
        *,
        tells_prompts: bool = False,
        tenancy: Tenancy | None = None,
    ) -> None:
        """`traces` records each request, with its prompt if `tells_prompts`; None: nothing is recorded. `tenancy`: what
        is kept apart and counted by tenant; None: caches only.
        """
        self._tenancy = tenancy or Tenancy()
        self._tells_prompts = tells_prompts
        self._model = model
        self._admission = admission
        self._attempts = attempts
        self._traces: TraceStore[RequestTrace] = traces or TraceStore()
        self._coalescing = coalescing or Coalescing()

    def with_routes(self, model: ServedModel, attempts: ExecutionDeps) -> Generation:
        """The pipeline of an adapter of this model: everything but the name and the routes is shared."""
        return Generation(
            model, self._admission, attempts, self._traces, self._coalescing,
            tells_prompts=self._tells_prompts, tenancy=self._tenancy,
        )  # fmt: skip

    @property
    def tenant_requests_max(self) -> int:
        """Generations that one tenant may have open at a time."""
        return self._admission.tenant_requests_max

    @contextlib.contextmanager
    def charged(
        self, caller: Caller, call: ClientCall, count: int = 1, *, choices_per_prompt: int = 1
    ) -> Iterator[None]:
        """One call of so many generations, each run by `generate` in this context: its tenant's rate and quota are
        charged before any work on it, and what it has used is recorded at its end.

        Raises:
            NotSupported: the model computes embeddings.
            Draining, Overloaded: they would not be admitted.
            QuotaExceeded: the tenant's quota does not allow them now.
            InvalidRequest: they are more than the tenant may have open.
        """
        if self._attempts.routes.embeds():
            raise NotSupported(f"model {self._model.name} computes embeddings, and generates nothing", field="model")
        caller.usage.choices_per_prompt = choices_per_prompt
        charge = self._charge_background if caller.is_background else self._admission.charge
        with self._tenancy.charged(caller, call, count, self._model.name, charge):
            yield

    def _charge_background(self, tenant: str, count: int) -> None:
        """A quota counts what runs at low priority too; a rate, which protects this frontend, does not."""
        self._admission.check_open()

    async def generate(
        self, request: pb.GenerateRequest, caller: Caller, answer: Answer, *, has_tool_grammar: bool = False
    ) -> None:
        """Generate into `answer`: accepted, chunks, exactly one finish.

        Cancelling this, at any point, aborts both legs in their engines.

        Args:
            request: as the client sent it; this pipeline is that of its model.
            caller: tenant and deadline.
            answer: receives the response. Chunks are pushed to it until the finish, also while this task waits.
            has_tool_grammar: the request's grammar is the frontend's own, made of its tools.

        Raises:
            TandemError: the only other end of a response, in place of the finish.
        """
        with (
            self._traces.following(trace_of(request, caller, self._model.name)) as record,
            self._counted(record, caller) as is_first,
            self._admitted(record, caller) as recorder,
        ):
            wanted = await checked_generate(
                request, self._model.tokenizer, record.request_id, has_tool_grammar=has_tool_grammar
            )
            recorder.checked(wanted)
            if is_first:
                # Charged once for all choices of a prompt, as its usage says.
                self._tenancy.quotas.spend(caller.tenant, caller.quota, len(wanted.token_ids))
            if self._tells_prompts and self._traces.ids is not None and is_sampled(record):
                record.prompt = await self._traced_prompt(wanted)
            relay = self._relay(wanted, record, answer)
            async with self._served(wanted, caller, relay, recorder) as stream:
                answer.accepted(self._accepted(wanted, stream.attempt))
                relay.open(stream.give_up)
                await stream.run()
                if relay.is_overrun:
                    raise Overloaded(f"the client does not read: over {UNREAD_TOKENS_MAX} tokens are waiting for it")
                route, prefill = _route(stream.attempt), stream.attempt.prefill_finish
                finish = relay.finish(len(wanted.token_ids), stream.finish(), prefill, route)
                self._check_prompt_logprobs(finish, wanted)
            # Both legs have ended and the slot is free: a client that has the finish may rely on both.
            recorder.finish(finish)
            await answer.finish(finish)

    def _check_prompt_logprobs(self, finish: pb.GenerateFinish, wanted: CheckedRequest) -> None:
        """Reject what a client cannot use: there is one for each token of the prompt but the first, or none at all."""
        is_wanted = wanted.logprobs is not None and wanted.logprobs.prompt
        expected_count = len(wanted.token_ids) - 1 if is_wanted else 0
        fault = fault_in(finish.prompt_logprobs, self._model.tokenizer.vocabulary_size)
        if len(finish.prompt_logprobs) != expected_count:
            fault = f"received {len(finish.prompt_logprobs)} log probabilities of the prompt, not {expected_count}"
        if fault is not None:
            raise LegFailed(fault)

    async def _traced_prompt(self, wanted: CheckedRequest) -> str:
        """The beginning of the prompt as the model reads it, control tokens included."""
        ids = wanted.token_ids[:TRACED_PROMPT_TOKENS_MAX]
        return await self._model.tokenizer.decode_all(ids, skip_special_tokens=False)

    @contextlib.contextmanager
    def _counted(self, trace: RequestTrace, caller: Caller) -> Iterator[bool]:
        """Collect a generation for its call. Yields whether it is the first one of its prompt."""
        try:
            yield caller.usage.add(trace)
        finally:
            # Also the tokens of a generation that fails or is cancelled were computed.
            self._tenancy.quotas.spend(caller.tenant, caller.quota, completion_tokens(trace))

    @contextlib.contextmanager
    def _admitted(self, trace: RequestTrace, caller: Caller) -> Iterator[Record]:
        record = Record(trace, self._traces.child)
        record.arrive()
        admission = self._admission
        with admission.admit_background() if caller.is_background else admission.admit(caller.fairness_id):
            record.step("admit")
            yield record

    @contextlib.asynccontextmanager
    async def _served(
        self, wanted: CheckedRequest, caller: Caller, relay: Relay, record: Record
    ) -> AsyncIterator[RetryingStream]:
        slot = self._admission.background_slot if caller.is_background else self._admission.slot
        async with slot(_queued(wanted, caller)) as prefill:
            record.step("wait")
            with naming_the_prompt(wanted.prompt_field):
                about = RoutingRequest(len(wanted.token_ids), session=caller.session, tenant=caller.tenant)
                legs = self._attempts.accepted(
                    self._leg(wanted, caller), relay, caller.left_s(), record, prefill, about
                )
                async with legs as stream:
                    yield stream

    def _leg(self, wanted: CheckedRequest, caller: Caller) -> leg_pb2.LegRequest:
        """The part of the request that both legs share."""
        return leg_pb2.LegRequest(
            request_id=wanted.request_id,
            model=self._model.engine_name,
            # Dispatch adds the digest of the weights that the chosen workers have.
            adapter=None if self._model.parent is None else worker_pb2.Adapter(name=self._model.name),
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
            priority=-PRIORITY_MAX if caller.is_background else wanted.priority,
            cache_salt=cache_salt(self._tenancy.cache_sharing, caller.tenant, wanted.cache_salt),
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
    """The request as the queue sees it. KV is charged for max_tokens: the real length is known only at the end."""
    return QueuedRequest(
        tokens=len(wanted.token_ids) + wanted.max_tokens,
        answer_tokens=wanted.max_tokens,
        prompt_tokens=len(wanted.token_ids),
        priority=wanted.priority or 0,
        tenant=caller.fairness_id,
        deadline_s=caller.deadline_s,
    )


def _route(attempt: Attempt) -> pb.Route:
    prefill = attempt.route.prefill
    return pb.Route(
        attempt=attempt.number,
        prefill_worker_id=prefill.worker_id if prefill else "",
        decode_worker_id=attempt.route.decode.worker_id,
        bootstrap_room=attempt.room,
        policy=attempt.route.pick.policy,
        expected_cached_tokens=attempt.route.expected_cached_tokens,
        placement=placement_to_proto(attempt.route.placement),
    )
