"""The engine port: all that a worker knows about the engine it owns.

Two adapters stand behind it, `tandem.engine.sglang` and `tandem.engine.simulated`, and both pass tests/contract.
An adapter owns its engine's processes, its KV memory and, in the prefill role, its bootstrap server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.model.generation import EngineRequest, TokenBatch
from tandem.model.worker import Capabilities, EngineLoad


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

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenBatch]:
        """Run one leg and yield its tokens as they come, each exactly once; the last batch carries `finish`.

        A prefill engine yields the first token and finishes when its KV has been handed over (or the hand-over
        ended). A decode engine yields all tokens, the first one included. Closing the iterator early, or cancelling
        the task that reads it, aborts the request in the engine; so does `abort`, after which the iterator ends with
        `FinishReason.ABORTED`.

        Raises:
            InvalidRequest: the engine refuses a value; `field` names it. May also come late: a grammar may turn out
                to allow nothing only while it is followed.
            NotSupported: this engine cannot do what a field asks.
            LegFailed: the hand-over between the two legs failed.
            EngineFailed: the engine died or broke its contract.
        """
        ...

    async def canary(self) -> None:
        """Run a small generation by itself, without a peer in any role: proves that the model runs, not the hand-over.

        Raises:
            EngineFailed: it did not end as it should, or the engine has died.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """Stop working on a request. Returns whether this engine knew it; never raises for an unknown id."""
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
