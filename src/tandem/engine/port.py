"""The engine port: all that a worker knows about the engine it owns.

Two adapters stand behind it, `tandem.engine.sglang` and `tandem.engine.simulated`, and both pass tests/contract.
An adapter owns its engine's processes, its KV memory and, in the prefill role, its bootstrap server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.domain.generation import EngineFinish, EngineRequest, TokenLogprob
from tandem.domain.worker import Capabilities, EngineLoad
from tandem.errors import TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapAddress:
    """Where decode engines meet a prefill engine."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvent:
    """One change of an engine's prefix cache."""

    sequence: int
    """Contiguous from 1 for each start of the engine; a gap means lost events."""
    kind: str
    """"stored", "removed" or "cleared"."""
    block_hashes: tuple[int, ...] = ()
    parent_block_hash: int | None = None
    token_ids: tuple[int, ...] = ()
    block_size_tokens: int = 0


class Output(Protocol):
    """Where an engine puts what it generates for one request.

    Tokens come in order, each exactly once; then exactly one end. No method may block, raise or call the engine back.
    """

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """The next tokens, 1 or more. `logprobs` is as long where the request asked for them, else empty."""
        ...

    def finish(self, finish: EngineFinish) -> None:
        """The end: by itself, or by an abort."""
        ...

    def fail(self, problem: TandemError) -> None:
        """The end: LegFailed (the hand-over between the two legs), EngineFailed, or a late InvalidRequest."""
        ...


class Engine(Protocol):
    """One engine in one role. Methods are called on the event loop that called `start`."""

    async def start(self) -> None:
        """Bring the engine up and return when it can generate.

        Raises:
            StartError: the engine cannot start; the message is one sentence that names the file, package or
                setting at fault.
        """
        ...

    async def stop(self) -> None:
        """End every process and free everything the engine holds, within 10 s. May be called twice, or before start."""
        ...

    def capabilities(self) -> Capabilities:
        """What the engine can do. Valid after `start`."""
        ...

    def bootstrap_address(self) -> BootstrapAddress | None:
        """Where decode engines meet this one; None unless its role is prefill. Valid after `start`."""
        ...

    async def submit(self, request: EngineRequest, output: Output) -> None:
        """Take one leg; returns when it waits in the engine. All that it generates goes to `output`.

        A prefill engine puts out the first token and ends when its KV has been handed over (or the hand-over ended). A
        decode engine puts out all tokens, the first one included. Outputs of one step of the engine come within one
        turn of the event loop.

        Args:
            request: the leg.
            output: called on the event loop, from now on until its end.

        Raises:
            InvalidRequest: the engine refuses a value; `field` names it. May also come late, as the output's failure:
                a grammar may turn out to allow nothing only while it is followed.
            NotSupported: this engine cannot do what a field asks.
            EngineFailed: the engine is dead or stalled.
        """
        ...

    async def canary(self) -> None:
        """Run a small generation by itself, without a peer in any role: proves that the model runs, not the hand-over.

        Raises:
            EngineFailed: it did not end as it should, or the engine has died.
        """
        ...

    def abort(self, request_id: str) -> bool:
        """Stop working on a request; its output has ended with `FinishReason.ABORTED` when this returns.

        The engine frees what the request held within a step or two. Returns whether it ran here; never raises for an
        unknown id.
        """
        ...

    async def load(self) -> EngineLoad:
        """How busy the engine is now."""
        ...

    async def flush_cache(self) -> bool:
        """Forget the prefix cache. Returns whether it was done (an engine with running requests may refuse)."""
        ...

    def kv_events(self, from_sequence: int | None) -> AsyncIterator[KvEvent]:
        """Changes of the prefix cache from a sequence number on, or (None) from now on, without end.

        Raises:
            NotSupported: this engine was started without KV events.
        """
        ...

    async def start_profile(self, directory: Path, *, steps_max: int, with_stack: bool) -> None:
        """Begin to record what the engine computes. One profile at a time; requests go on, slower.

        Args:
            directory: where the files will be; it is there, and empty.
            steps_max: most steps to record; the engine stops by itself when they are done.
            with_stack: whether each operation tells its Python frames.

        Raises:
            NotSupported: this engine cannot.
            ProfileFailed: it refuses now.
            EngineFailed: it has died.
        """
        ...

    async def stop_profile(self) -> None:
        """Stop recording and return when the files are written, one for each rank. No step runs meanwhile.

        Raises:
            ProfileFailed: there is no profile.
            EngineFailed: the engine has died.
        """
        ...

    def stalled(self) -> str | None:
        """One sentence while the engine lives but cannot answer, known without asking it; None otherwise.

        Requests end with EngineFailed when it begins, and are refused so until it is over.
        """
        ...

    async def wait_failed(self) -> str:
        """Return one sentence when the engine has died by itself; never return otherwise."""
        ...
