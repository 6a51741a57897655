"""The engine port: the interface between a worker and its engine.

Two adapters implement it, `tandem.engine.sglang` and `tandem.engine.simulated`; both pass tests/contract. An adapter
owns its engine's processes, its KV memory and, in the prefill role, its bootstrap server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.domain.adapter import Adapter
from tandem.domain.generation import EngineFinish, EngineRequest, TokenLogprob
from tandem.domain.handover import DropReason
from tandem.domain.worker import Capabilities, EngineLoad, WorkerRole
from tandem.errors import TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapAddress:
    """Address of a prefill engine's bootstrap server, to which decode engines connect."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvent:
    """One change of an engine's prefix cache. Blocks are named by `tandem.domain.kv_blocks`."""

    sequence: int
    """Contiguous from 1 for each start of the engine; a gap means that events were lost."""
    kind: str
    """"stored", "removed" or "cleared"."""
    block_hashes: Sequence[int] = ()
    parent_block_hash: int | None = None
    """Of "stored": the block before the first one; None at the start of a sequence."""
    token_ids: Sequence[int] = ()
    """Of "stored": the blocks' tokens, in order."""
    block_size_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSnapshot:
    """The whole contents of an engine's prefix cache after an event."""

    sequence: int
    """The last event before; 0: none."""
    block_hashes: Sequence[int]
    """In no order, each once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUnknown:
    """Events were lost: until the next snapshot, the contents of the prefix cache are unknown."""

    sequence: int


class KvCache(Protocol):
    """What a worker knows of its engine's prefix cache, for any number of readers at a time."""

    @property
    def block_size_tokens(self) -> int:
        """Tokens in a block."""
        ...

    def events(self, from_sequence: int | None) -> AsyncIterator[KvEvent]:
        """Stream the changes, from a sequence number or (None) from now on, until the engine takes another role.

        A reader that is too slow sees a gap in the sequence numbers.

        Raises:
            InvalidRequest: events from there on are no longer kept; from the first `anext`.
        """
        ...

    def follow(self) -> AsyncIterator[KvSnapshot | KvEvent | KvUnknown]:
        """Stream a snapshot and then the changes after it, until the engine takes another role.

        After lost events: `KvUnknown`, and a new snapshot when the contents are known again. A reader that is too slow
        gets a new snapshot too. Of a cache that cannot be followed, `KvUnknown` is all that comes.
        """
        ...

    async def wait_refused(self) -> str | None:
        """Return one sentence once the engine's events are refused: they are none that this worker understands.

        None: the engine has taken another role before, and no longer has this cache.
        """
        ...


class Output(Protocol):
    """Receives what an engine generates for one request.

    Tokens arrive in order, each exactly once; then exactly one end. Methods must not block, raise or call the engine.
    """

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """The next tokens, at least one. `logprobs` has one entry per token if requested, else none."""
        ...

    def finish(self, finish: EngineFinish) -> None:
        """The generation ended, by itself or by an abort."""
        ...

    def fail(self, problem: TandemError) -> None:
        """The generation failed: LegFailed (the KV transfer), EngineFailed, or a late InvalidRequest."""
        ...


class Engine(Protocol):
    """One engine in one role at a time. Methods are called on the event loop that called `start`."""

    async def start(self) -> None:
        """Start the engine; return when it can generate.

        Raises:
            StartError: the engine cannot start; one sentence that names the file, package or setting at fault.
        """
        ...

    async def stop(self) -> None:
        """End the engine's processes and release its resources, within 10 s. May be called twice, or before `start`."""
        ...

    async def switch_role(self, role: WorkerRole) -> None:
        """Take another role with the weights in place. The caller submits nothing meanwhile, and no request is open.

        Afterwards the prefix cache is empty, `kv_cache` is another object (readers of the former one have come to
        their end), and `capabilities` and `bootstrap_address` are those of the new role.

        Raises:
            NotSupported: it cannot do so for that role, and has not changed: start another engine instead.
            EngineFailed: the engine is unusable, or did not become idle in time: start another one.
        """
        ...

    def capabilities(self) -> Capabilities:
        """The engine's capabilities. Valid after `start`."""
        ...

    def bootstrap_address(self) -> BootstrapAddress | None:
        """The bootstrap server's address; None unless the role is prefill. Valid after `start`."""
        ...

    async def submit(self, request: EngineRequest, output: Output) -> None:
        """Submit one leg; returns when the engine has queued it. Its results go to `output`.

        A prefill engine outputs the first token and ends when its KV transfer has ended. A decode engine outputs all
        tokens, the first one included. Outputs of one engine step arrive within one iteration of the event loop.
        A request with `embedding` outputs no token; its finish has the embedding.

        Args:
            request: the leg.
            output: called on the event loop, from now on until the leg's end.

        Raises:
            InvalidRequest: the engine rejects a value; `field` names it. Also possible later, through `output.fail`:
                some grammars are found to be unsatisfiable only during generation.
            NotSupported: the engine does not support a field; `field` names it.
            EngineFailed: the engine is dead or stalled.
        """
        ...

    async def load_adapter(self, adapter: Adapter, path: Path) -> None:
        """Load an adapter whose files have been checked (`tandem.domain.adapter.read_adapter`). Requests go on.

        Raises:
            NotSupported: the engine was started without adapters.
            AdapterRefused: it cannot load this one; nothing has changed.
            EngineFailed: the engine has died.
        """
        ...

    async def unload_adapter(self, adapter: Adapter) -> None:
        """Release an adapter; returns when no request uses it any more. An unknown one is no error.

        Raises:
            AdapterRefused: the engine did not release it.
            EngineFailed: the engine has died.
        """
        ...

    async def canary(self) -> None:
        """Run a small generation without a peer, in any role; with task embed, a small embedding. Tests the model, not
        the KV transfer.

        Raises:
            EngineFailed: it failed, or the engine has died.
        """
        ...

    def abort(self, request_id: str) -> bool:
        """Abort a request; its output has ended with `FinishReason.ABORTED` when this returns.

        The engine frees the request's memory within a step or two. Returns whether the request was running; an unknown
        id is not an error.
        """
        ...

    async def load(self) -> EngineLoad:
        """The engine's current load."""
        ...

    async def flush_cache(self) -> bool:
        """Flush the prefix cache. Returns whether it was flushed (an engine with running requests may refuse)."""
        ...

    def kv_cache(self) -> KvCache:
        """The prefix cache, as reported by its events. Valid after `start`; the same object until `switch_role`.

        Raises:
            NotSupported: this engine was started without KV events, or has no prefix cache.
        """
        ...

    async def read_kv_cache(self) -> KvSnapshot:
        """Ask the engine itself for the contents of its prefix cache: for repairs, and to check `kv_cache`.

        Blocks the engine for some milliseconds. `sequence` is that of `kv_cache` at the same moment.

        Raises:
            NotSupported: as `kv_cache`.
            EngineFailed: the engine has died, or did not answer in time.
        """
        ...

    async def start_profile(self, directory: Path, *, steps_max: int, with_stack: bool) -> None:
        """Start a profile. One at a time; requests continue, slower.

        Args:
            directory: existing, empty directory for the files.
            steps_max: number of engine steps after which recording stops by itself.
            with_stack: whether to record the Python stack of each operation.

        Raises:
            NotSupported: this engine has no profiler.
            ProfileFailed: the engine refused.
            EngineFailed: the engine has died.
        """
        ...

    async def stop_profile(self) -> None:
        """Stop the profile; return when its files are written, one per rank. No engine step runs meanwhile.

        Raises:
            ProfileFailed: no profile was recorded.
            EngineFailed: the engine has died.
        """
        ...

    def stalled(self) -> str | None:
        """One sentence while the engine is alive but cannot respond, detected without a request to it; None otherwise.

        When a stall begins, running requests end with EngineFailed; new ones are rejected with it until the stall ends.
        """
        ...

    def handover_trouble(self) -> str | None:
        """One sentence while the engine computes but cannot hand over KV; None otherwise. Running requests go on."""
        ...

    def dropped_messages(self) -> Mapping[DropReason, int]:
        """Messages that the engine's hand-over ports have dropped since its start; empty if it has none that drops."""
        ...

    async def wait_failed(self) -> str:
        """Return one sentence once the engine has died by itself; otherwise never return."""
        ...
