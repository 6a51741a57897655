"""A call of several embeddings: its vectors are of the same weights, and it counts as one request."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem_frontend.admin.stats import RequestStats
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.call_context import Caller
from tandem_frontend.embedding import Embeddings
from tandem_frontend.preparation.served_model import ServedModel

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.worker import Worker
from tandem.errors import Draining, LegFailed, NoWorkers, TandemError
from tandem.observability.request_trace import FAILED, FINISHED, RequestTrace
from tandem.observability.trace_store import TraceStore
from tests.unit.support.scripted_legs import ScriptedLeg, accepted, fail
from tests.unit.test_embeddings import VECTOR, embedder, ends_with
from tests.unit.test_frontend_attempts import Scene

NEW = "e" * 64


def renewed(worker_id: str) -> Worker:
    one: Worker = embedder(worker_id)
    return replace(one, capabilities=replace(one.capabilities, model_digest=NEW))


class Calls:
    """Calls for embeddings over scripted workers: those with a name that begins with "new" have other weights."""

    def __init__(self, *names: str) -> None:
        self.scene = Scene(*(renewed(name) if name.startswith("new") else embedder(name) for name in names))
        self.scene.dispatch.leg = self._leg  # type: ignore[method-assign]
        self.sent: list[str] = []
        self.first_answer: TandemError | None = None
        """What the first leg ends with instead of a vector."""
        self.on_send: Callable[[], None] = lambda: None
        self.traces: TraceStore[RequestTrace] = TraceStore()
        self.open_max = 0

    def _leg(self, worker_id: str, sink: Any) -> ScriptedLeg:
        self.sent.append(worker_id)
        self.open_max = max(self.open_max, len(self.traces.open))
        self.on_send()
        problem, self.first_answer = self.first_answer, None
        if problem is not None:
            words = (fail(problem),) if isinstance(problem, Draining) else (accepted, fail(problem))
            return ScriptedLeg(*words).play(sink)
        return ScriptedLeg(accepted, ends_with(*VECTOR)).play(sink)

    async def embed(self, count: int, caller: Caller | None = None) -> list[str]:
        """The workers of the vectors of a call with so many equal inputs."""
        tokenizer = SimpleNamespace(vocabulary_size=100, fits_vocabulary=True, context_tokens_max=100)
        model = ServedModel("m", cast("Any", tokenizer), {})
        admission = cast("Any", SimpleNamespace(charge=lambda *_: None, admit=_admitted, slot=_slot))
        pipeline = Embeddings(model, admission, self.scene.attempts, lambda: self.scene.workers, self.traces)
        request = pb.EmbedRequest(inputs=[pb.EmbedInput(token_ids={"ids": [1, 2]})] * count)  # type: ignore[arg-type]
        call = cast("Any", None)
        response = await pipeline.embed(request, caller or Caller(), call)
        return [one.worker_id for one in response.embeddings]


def _admitted(fairness_id: str) -> Any:

    return nullcontext()


@asynccontextmanager
async def _slot(queued: Any) -> AsyncIterator[Any]:
    yield PrefillBacklog("", math.inf).reserve(1)


async def test_embeddings_call_while_weights_are_renewed_has_vectors_of_one_kind() -> None:
    calls = Calls("old-0", "old-1", "new-0", "new-1")
    kinds = set[str]()
    for _ in range(10):
        workers = await calls.embed(64)
        assert len({name[:3] for name in workers}) == 1, workers
        assert len(set(workers)) == 2, "the workers with the same weights share the call"
        kinds.add(workers[0][:3])
    assert kinds == {"old", "new"}


async def test_embeddings_first_input_that_breaks_is_computed_by_the_weights_that_others_have() -> None:
    calls = Calls("old-0", "old-1", "new-0", "new-1")
    calls.first_answer = LegFailed("died")
    workers = await calls.embed(8)
    assert {name[:3] for name in workers} == {calls.sent[0][:3]}, workers
    assert calls.sent[0] not in workers[:1]


async def test_embeddings_first_input_that_a_leaving_worker_refuses_is_of_any_weights() -> None:
    calls = Calls("old-0", "new-0")
    calls.first_answer = Draining("going")
    workers = await calls.embed(8)
    assert len(set(workers)) == 1
    assert calls.sent[0] not in workers


async def test_embeddings_call_whose_weights_no_worker_has_any_more_names_them() -> None:
    calls = Calls("old-0")
    digest = calls.scene.workers[0].capabilities.model_digest

    def renew() -> None:
        calls.scene.workers = (renewed("new-0"),)

    calls.on_send = renew
    with pytest.raises(NoWorkers, match=f"weights that this call began with .{digest[:12]}") as problem:
        await calls.embed(8)
    assert problem.value.metadata["model_digest"] == digest
    assert calls.sent == ["old-0"]


async def test_embeddings_call_of_many_inputs_is_one_request_and_one_trace() -> None:
    calls = Calls("old-0", "old-1")
    stats, caller = RequestStats(calls.traces), Caller()
    parts: list[RequestTrace] = []
    calls.traces.part_sinks.append(parts.append)
    for _ in range(2):
        await calls.embed(300, caller)
    assert calls.open_max == 1
    first, last = calls.traces.closed
    assert first.request_id != last.request_id
    assert [(one.outcome, one.prompt_tokens, len(one.attempts)) for one in (first, last)] == [(FINISHED, 600, 1)] * 2
    assert stats.outcomes == {FINISHED: 2}
    assert len({trace.request_id for trace in parts}) == 598
    assert sum(len(trace.attempts) for trace in parts) == 598, "metrics count the attempts of all inputs"
    assert caller.usage.summed().prompt_tokens == 1_200


async def test_embeddings_input_that_fails_fails_its_call_and_counts_at_its_worker() -> None:
    calls = Calls("old-0")
    stats, caller = RequestStats(calls.traces), Caller()
    calls.on_send = lambda: setattr(calls, "first_answer", LegFailed("died") if len(calls.sent) > 3 else None)
    with pytest.raises(LegFailed):
        await calls.embed(40, caller)
    assert stats.outcomes == {FAILED: 1}
    assert stats.leg_failures[("old-0", "LEG_FAILED")] >= 1
    assert caller.usage.summed().outcome == FAILED
    assert 0 < caller.usage.summed().prompt_tokens < 80, "what was dispatched"
