"""The pipeline of a model's embeddings: the stages of `pipeline`, but with no stream behind them.

    admit -> validate and tokenise -> for each input: wait in the queue -> route -> dispatch -> supervise

A call is one open request, whatever the number of its inputs. Each input is a leg of its own: the engines batch them,
the queue is fair between them and others, several workers share a call, and an input whose worker dies is computed on
another one. Owns how many of them a call has on the workers at a time, and the response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2, leg_pb2, sampling_pb2
from tandem.domain.worker import Capabilities, Worker, WorkerState
from tandem.errors import NotSupported, RequestAborted, TandemError
from tandem.observability.request_trace import RequestTrace
from tandem.observability.trace_store import TraceStore
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.call_context import Caller
from tandem_frontend.execution.link_leg import Logprobs
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.execution.trace_recorder import Record
from tandem_frontend.preparation.embedding_inputs import CheckedEmbed, checked_embed, input_id
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.validation import REQUEST_ID, naming_the_prompt, new_request_id
from tandem_frontend.response.writers import ClientCall
from tandem_frontend.routing.policy import RoutingRequest
from tandem_frontend.tenancy import Tenancy

OPERATION = "embeddings"
"""The endpoint's name in traces and metrics, as OpenTelemetry's conventions for GenAI have it."""
PARALLEL_MAX = 32
"""Inputs of one call on the workers at a time: enough to fill the batches of several engines."""


class NoTokens:
    """A `TokenSink` of a leg that generates nothing."""

    is_over = False
    ends_the_legs = False

    def take(self, token_ids: object, logprobs: Logprobs) -> None:
        """Never called by a worker that keeps to the contract; otherwise the request fails."""
        raise TandemError("a worker generated tokens for an embedding")


class Embeddings:
    """Runs the requests for embeddings of one model."""

    def __init__(
        self,
        model: ServedModel,
        admission: Admission,
        attempts: ExecutionDeps,
        workers: Callable[[], tuple[Worker, ...]],
        traces: TraceStore[RequestTrace] | None = None,
        tenancy: Tenancy | None = None,
    ) -> None:
        """`workers` are those of the model in the registry's view. `traces` records each call with its first input, and
        `tenancy` counts by tenant; None: neither is done.
        """
        self._model = model
        self._admission = admission
        self._attempts = attempts
        self._workers = workers
        self._traces: TraceStore[RequestTrace] = traces or TraceStore()
        self._tenancy = tenancy or Tenancy()

    async def embed(self, request: pb.EmbedRequest, caller: Caller, call: ClientCall) -> pb.EmbedResponse:
        """Compute the embeddings of all inputs. The first failure of an input ends the call, and aborts the others.

        Cancelling this, at any point, aborts every leg in its engine.

        Args:
            request: as the client sent it; this pipeline is that of its model.
            caller: tenant and deadline. The call counts as one request in its rate and quota.
            call: gets the headers of the tenant's quota.

        Raises:
            NotSupported: the model generates.
            TandemError: the request is wrong, is not admitted, or an input cannot be computed.
        """
        if self._attempts.routes.embeds() is False:
            raise NotSupported(f"model {self._model.name} generates, and computes no embeddings", field="model")
        with self._tenancy.charged(caller, call, 1, self._model.name, self._admission.charge):
            trace = self._trace(_request_id(request), caller, caller.time.begin_time_s)
            with self._traces.following(trace), self._admission.admit(caller.fairness_id):
                record = self._recorded(trace, caller)
                record.step("admit")
                wanted = await checked_embed(request, self._model.tokenizer, self._about())
                record.step("tokenise")
                self._tenancy.quotas.spend(caller.tenant, caller.quota, wanted.prompt_tokens)
                embeddings, cached_tokens = await self._run(wanted, caller, record)
                trace.finish("stop", wanted.prompt_tokens, 0, cached_tokens)
        usage = generation_pb2.Usage(prompt_tokens=wanted.prompt_tokens, cached_tokens=cached_tokens)
        return pb.EmbedResponse(request_id=trace.request_id, model=self._model.name, embeddings=embeddings, usage=usage)

    async def _run(self, wanted: CheckedEmbed, caller: Caller, first: Record) -> tuple[list[pb.Embedding], int]:
        """All embeddings, in order, and the tokens that were in prefix caches."""
        numbers, found = iter(range(len(wanted.inputs))), dict[int, tuple[pb.Embedding, int]]()
        weights: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def work() -> None:
            for number in numbers:
                if number == 0:
                    found[number] = await self._one(wanted, number, caller, first, weights)
                    continue
                # Vectors of different weights cannot be compared: the worker that accepts the first input fixes them.
                await asyncio.wait((weights,))
                part = self._part(first.trace, number, caller)
                try:
                    found[number] = await self._one(wanted, number, caller, part, weights)
                finally:
                    self._traces.close_part(part.trace)
                    first.trace.prompt_tokens += part.trace.prompt_tokens

        if len(wanted.inputs) == 1:
            await work()
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(PARALLEL_MAX, len(wanted.inputs))):
                        group.create_task(work())
            except ExceptionGroup as problems:
                # The client gets one error. A TandemError is written for clients; any other exception is a defect.
                known = [problem for problem in problems.exceptions if isinstance(problem, TandemError)]
                raise (known or problems.exceptions)[0] from None
        ordered = [found[number] for number in range(len(wanted.inputs))]
        return [embedding for embedding, _ in ordered], sum(cached for _, cached in ordered)

    async def _one(
        self, wanted: CheckedEmbed, number: int, caller: Caller, record: Record, weights: asyncio.Future[str]
    ) -> tuple[pb.Embedding, int]:
        """The embedding of one input, and how many of its tokens were in a prefix cache.

        `weights`: of the call's first input, which sets them.
        """
        given = wanted.inputs[number]
        count = len(given.token_ids)
        queued = QueuedRequest(
            tokens=count,
            answer_tokens=0,
            prompt_tokens=count,
            priority=wanted.priority,
            tenant=caller.fairness_id,
            deadline_s=caller.deadline_s,
        )
        leg = self._leg(wanted, number, record.trace.request_id)
        async with self._admission.slot(queued) as prefill:
            record.step("wait")
            # Usage counts what was dispatched, also where the call ends early.
            record.trace.prompt_tokens += count
            digest = weights.result() if weights.done() else ""
            about = RoutingRequest(count, session=caller.session, tenant=caller.tenant, model_digest=digest)
            with naming_the_prompt(given.field):
                legs = self._attempts.accepted(leg, NoTokens(), caller.left_s(), record, prefill, about)
                async with legs as stream:
                    if number == 0 and len(wanted.inputs) > 1:
                        weights.set_result(stream.hold_weights())
                    await stream.run()
                    finish, worker = stream.finish(), stream.attempt.route.decode
        if finish is None or not finish.embedding:
            raise RequestAborted(f"the leg was aborted on {worker.worker_id}")
        embedding = pb.Embedding(values=finish.embedding, prompt_tokens=count, worker_id=worker.worker_id)
        return embedding, finish.usage.cached_tokens

    def _leg(self, wanted: CheckedEmbed, number: int, request_id: str) -> leg_pb2.LegRequest:
        return leg_pb2.LegRequest(
            request_id=request_id,
            model=self._model.name,
            token_ids=wanted.inputs[number].token_ids,
            # Of no meaning to an engine that embeds; every leg has it.
            stopping=sampling_pb2.Stopping(max_tokens=1),
            priority=wanted.priority,
            embedding=leg_pb2.EmbeddingOptions(dimensions=wanted.dimensions),
        )

    def _about(self) -> Capabilities | None:
        """What the first worker that serves says of the model's embeddings; None: there is none."""
        for worker in self._workers():
            if worker.state is WorkerState.SERVING and worker.capabilities.embeds:
                return worker.capabilities
        return None

    def _trace(self, request_id: str, caller: Caller, begin_s: float = 0.0) -> RequestTrace:
        return RequestTrace(
            request_id=request_id,
            call_id=caller.call_id,
            operation=OPERATION,
            model=self._model.name,
            tenant=caller.tenant,
            parent=caller.trace,
            edge_begin_s=caller.edge_begin_s,
            clock=caller.time,
            begin_s=begin_s,
        )

    def _part(self, call: RequestTrace, number: int, caller: Caller) -> Record:
        """Records an input after the first: a call has one trace, and a long one must not displace those of others."""
        trace = self._trace(input_id(call.request_id, number), caller, call.clock())
        trace.span_context = call.span_context
        return Record(trace)

    def _recorded(self, trace: RequestTrace, caller: Caller) -> Record:
        caller.usage.add(trace)
        return Record(trace, self._traces.child)


def _request_id(request: pb.EmbedRequest) -> str:
    return request.request_id if REQUEST_ID.fullmatch(request.request_id) else new_request_id()
