"""What is possible for a request, given the workers alive: pairs that can exchange KV, and aggregated workers.

Pure. Owns the reasons why nothing is possible; prefers nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from tandem.errors import ContextExceeded, IncompatibleWorkers, NoWorkers
from tandem.model.worker import Start, Worker, WorkerRole, WorkerState, incompatible_field


@dataclass(frozen=True, slots=True)
class Pick:
    """How a route came to be chosen; for whoever asks later."""

    candidates_count: int = 0
    """Pairs and aggregated workers that were possible."""
    candidates: str = ""
    """Some of the workers among them, by name."""
    policy: str = ""
    """The policy's name."""
    why: str = ""
    """In words."""


@dataclass(frozen=True, slots=True)
class Route:
    """Who serves an attempt."""

    decode: Worker
    """A decode worker, or an aggregated one."""
    prefill: Worker | None
    """None on an aggregated route."""
    pick: Pick = field(default=Pick(), compare=False)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """All who take part."""
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that can stream the answer, and the prefill workers it can receive KV from."""

    decode: Worker
    prefills: tuple[Worker, ...]
    """Empty for an aggregated worker only."""


def candidates(workers: Iterable[Worker], model: str, tokenizer_digest: str) -> tuple[Candidate, ...]:
    """All that could serve a request for a model; never empty.

    Raises:
        NoWorkers: a role is missing.
        IncompatibleWorkers: workers are there, but none fit together, or none read this frontend's tokens.
    """
    serving = [w for w in workers if w.capabilities.model == model and w.state is WorkerState.SERVING]
    readers = [w for w in serving if w.capabilities.tokenizer_digest == tokenizer_digest]
    if serving and not readers:
        raise IncompatibleWorkers(
            f"the {len(serving)} workers of model {model} have another tokenizer than this frontend",
            field="tokenizer_digest",
        )
    by_role = {role: [w for w in readers if w.role is role] for role in WorkerRole}
    found = [Candidate(worker, ()) for worker in by_role[WorkerRole.AGGREGATED]]
    for decode in by_role[WorkerRole.DECODE]:
        prefills = tuple(p for p in by_role[WorkerRole.PREFILL] if _suit(p, decode))
        if prefills:
            found.append(Candidate(decode, prefills))
    if not found:
        raise _nothing(by_role[WorkerRole.PREFILL], by_role[WorkerRole.DECODE], model)
    return tuple(found)


def without(possible: Iterable[Candidate], avoided: Collection[Start]) -> tuple[Candidate, ...]:
    """What is left when some workers are left out; may be empty."""
    left = []
    for candidate in possible:
        prefills = tuple(prefill for prefill in candidate.prefills if prefill.start not in avoided)
        has_peer = bool(prefills) or not candidate.prefills
        if candidate.decode.start not in avoided and has_peer:
            left.append(Candidate(candidate.decode, prefills))
    return tuple(left)


def able_to_hold(possible: Sequence[Candidate], prompt_tokens: int) -> tuple[Candidate, ...]:
    """Those whose engines have a place for a prompt and for one token more; never empty.

    Raises:
        ContextExceeded: there are none. An engine whose KV memory is small takes less than the model's context.
    """
    small = {
        worker.start
        for candidate in possible
        for worker in (candidate.decode, *candidate.prefills)
        if worker.capabilities.context_tokens_max <= prompt_tokens
    }
    left = without(possible, small)
    if not left:
        most = max(map(_context_tokens, possible))
        raise ContextExceeded(
            "token_ids", f"{prompt_tokens} tokens leave no room in the {most} that the engines take now", limit=most
        )
    return left


def _context_tokens(candidate: Candidate) -> int:
    own = candidate.decode.capabilities.context_tokens_max
    return min(own, max((prefill.capabilities.context_tokens_max for prefill in candidate.prefills), default=own))


def _suit(prefill: Worker, decode: Worker) -> bool:
    return incompatible_field(prefill.capabilities, decode.capabilities) is None


def _nothing(prefills: Sequence[Worker], decodes: Sequence[Worker], model: str) -> NoWorkers | IncompatibleWorkers:
    """Why there is neither a pair nor an aggregated worker."""
    if not prefills and not decodes:
        return NoWorkers(f"no worker serves model {model} now", role="any", model=model)
    if not prefills or not decodes:
        missing = "decode" if prefills else "prefill"
        return NoWorkers(f"no {missing} worker serves model {model} now", role=missing, model=model)
    prefill, decode = prefills[0], decodes[0]
    field = incompatible_field(prefill.capabilities, decode.capabilities)
    assert field is not None, "a compatible pair was passed over"
    here, there = (getattr(worker.capabilities, field) for worker in (prefill, decode))
    return IncompatibleWorkers(
        f"no prefill worker fits a decode worker: {field} is {here} on {prefill.worker_id}, {there} on "
        f"{decode.worker_id}",
        field=field,
        prefill=prefill.worker_id,
        decode=decode.worker_id,
    )
