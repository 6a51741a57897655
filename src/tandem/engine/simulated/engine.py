"""Implements the engine port: checks settings and requests, and reports capabilities and load.

`machine` runs the requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import tandem
from tandem.domain.adapter import Adapter
from tandem.domain.checkpoint import Checkpoint, read_checkpoint
from tandem.domain.generation import EngineRequest, Sampling, Stopping
from tandem.domain.handover import DropReason
from tandem.domain.limits import TOP_LOGPROBS_MAX
from tandem.domain.worker import EMBED, Capabilities, EngineLoad, WorkerRole
from tandem.engine.kv_mirror import KvCacheMirror
from tandem.engine.port import BootstrapAddress, KvSnapshot, Output
from tandem.engine.pulling import BatchQueue
from tandem.engine.settings import EngineSettings, embedding_capabilities
from tandem.engine.simulated.embeddings import EmbeddingOutput, as_generation, embedding_of
from tandem.engine.simulated.faults import FaultInjected, Faults
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg, Phase
from tandem.engine.simulated.machine import Machine
from tandem.engine.simulated.network import Network, TcpNetwork
from tandem.engine.simulated.options import parse_options
from tandem.engine.simulated.timing import Clock, SystemClock
from tandem.engine.simulated.tokens import read_vocabulary
from tandem.errors import (
    AdapterRefused,
    ConfigError,
    ContextExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    NotSupported,
    StartError,
)


def load(legs: Collection[Leg], pool: KvPool, chunked: Leg | None) -> EngineLoad:
    """The current load, from the legs' phases and the pool's account.

    What is left of a partly computed prompt waits too, as in SGLang's own reports; `chunked` is its leg.
    """
    phases = Counter(leg.phase for leg in legs)
    account = pool.account()
    page = pool.page_size_tokens
    waiting = [leg for leg in legs if leg.phase in (Phase.WAITING, Phase.RETRACTED)]
    return EngineLoad(
        running_requests=phases[Phase.RUNNING] + phases[Phase.PREFILLING],
        waiting_requests=len(waiting),
        waiting_tokens=sum(leg.sequence_tokens for leg in waiting)
        + (0 if chunked is None else chunked.sequence_tokens - chunked.computed_tokens),
        kv_used_tokens=(account.lent + account.transferring + account.withheld) * page,
        kv_capacity_tokens=pool.capacity_tokens,
        transferring_requests=phases[Phase.BOOTSTRAP] + phases[Phase.PREALLOCATING] + phases[Phase.TRANSFERRING],
        kv_transferring_tokens=account.transferring * page,
        kv_cached_tokens=account.cached * page,
        kv_free_tokens=account.free * page,
    )


ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_CAPACITY_TOKENS = 16_384
RUNNING_REQUESTS_MAX = 16
IDLE_TIMEOUT_S = 5.0
"""How long a role switch waits for the pages of requests that have just ended."""
IDLE_CHECK_S = 0.005
TRANSFER_BACKENDS = {"nixl": "simulated", "simulated": "simulated", "fake": "fake"}


class SimulatedEngine:
    """An `Engine` that generates tokens by hashing and takes its time from timers."""

    def __init__(self, settings: EngineSettings, clock: Clock | None = None, network: Network | None = None) -> None:
        """Check the settings; opens nothing.

        Args:
            settings: `extra` takes the fields of `Options`.
            clock: default: real time.
            network: default: TCP.

        Raises:
            ConfigError: a key of `extra`, the dtype or the transfer backend is unknown.
        """
        self._settings = settings
        self._options = parse_options(
            {"transfer_timeout_s": settings.handover_timeout_s, "kv_events": settings.kv_events is not False}
            | settings.extra
            | ({"prefix_cache": False} if settings.task == EMBED else {})
        )
        if settings.dtype not in ("auto", *ELEMENT_BYTES):
            raise ConfigError("dtype", f"must be auto, {', '.join(ELEMENT_BYTES)}, not {settings.dtype!r}")
        if settings.transfer_backend not in TRANSFER_BACKENDS:
            known = ", ".join(TRANSFER_BACKENDS)
            raise ConfigError("transfer_backend", f"must be one of {known}, not {settings.transfer_backend!r}")
        self._clock = clock or SystemClock()
        self._network = network or TcpNetwork()
        self._machine: Machine | None = None
        self._capabilities: Capabilities | None = None
        self._bootstrap_port: int | None = None
        self._checkpoint: Checkpoint
        self._canaries = itertools.count(1)
        self._adapters: set[Adapter] = set()

    @property
    def faults(self) -> Faults:
        """The fault rules of a started engine, for tests in the same process."""
        return self._running().faults

    async def start(self) -> None:
        """Read the model directory and, in the prefill role, start the bootstrap server. See the port."""
        checkpoint = await asyncio.to_thread(read_checkpoint, self._settings.model_path)
        if self._settings.task == EMBED:
            checkpoint.check_embeds()
        self._machine = await self._make_machine(checkpoint)

    async def _make_machine(self, checkpoint: Checkpoint) -> Machine:
        """A started machine in the settings' role; sets what the engine says of itself."""
        vocabulary = await asyncio.to_thread(read_vocabulary, checkpoint, self._options.eos_chance)
        if self._options.eos_after_tokens is not None and vocabulary.eos_token_id is None:
            raise ConfigError("engine_extra.eos_after_tokens", "the model has no end-of-sequence token")
        capabilities = self._describe(checkpoint)
        if capabilities.kv_capacity_tokens < 2 * self._options.page_size_tokens:
            raise StartError(
                f"kv_capacity_tokens: must be at least two pages of {self._options.page_size_tokens} tokens"
            )
        machine = Machine(
            self._settings.role,
            self._options,
            capabilities,
            vocabulary,
            self._clock,
            self._network,
            self._settings.seed,
            self._settings.kv_check_share,
        )
        self._bootstrap_port = await machine.start(self._settings.host, self._settings.bootstrap_port)
        self._capabilities, self._checkpoint = capabilities, checkpoint
        return machine

    async def switch_role(self, role: WorkerRole) -> None:
        """See the port. Between prefill and decode, as SGLang: a new scheduler and pool, after `role_switch_s`."""
        machine = self._running()
        if WorkerRole.AGGREGATED in (role, self._settings.role):
            raise NotSupported("an engine switches in place between prefill and decode only")
        await self._wait_idle(machine)
        self._machine = None
        await machine.stop()
        self._settings = replace(self._settings, role=role)
        await self._clock.sleep(self._options.role_switch_s)
        try:
            self._machine = await self._make_machine(self._checkpoint)
        except StartError as problem:
            raise EngineFailed(f"the role switch failed: {problem}") from None

    async def _wait_idle(self, machine: Machine) -> None:
        waited_s = 0.0
        while machine.legs:
            if waited_s >= IDLE_TIMEOUT_S:
                raise EngineFailed(f"requests still hold pages {IDLE_TIMEOUT_S:g} s after their end")
            await self._clock.sleep(IDLE_CHECK_S)
            waited_s += IDLE_CHECK_S

    async def stop(self) -> None:
        """Abort everything and close the sockets."""
        machine, self._machine = self._machine, None
        if machine is not None:
            await machine.stop()

    def capabilities(self) -> Capabilities:
        """See the port."""
        if self._capabilities is None:
            raise EngineFailed("the simulated engine is not started")
        return self._capabilities

    def bootstrap_address(self) -> BootstrapAddress | None:
        """See the port. `bootstrap_advertised_port` replaces the real port, for a proxy in front of it."""
        if self._bootstrap_port is None:
            return None
        port = self._options.bootstrap_advertised_port or self._bootstrap_port
        return BootstrapAddress(host=self._settings.host, port=port)

    async def submit(self, request: EngineRequest, output: Output) -> None:
        """See the port."""
        machine = self._running()
        self._check(request, machine)
        if request.embedding is not None:
            about = self.capabilities()
            size = request.embedding.dimensions or about.embedding_size
            output = EmbeddingOutput(output, embedding_of(request.token_ids, size, about.model_digest))
            request = as_generation(request)
        machine.begin(request, output)

    async def load_adapter(self, adapter: Adapter, path: Path) -> None:
        """See the port. Its tokens depend on its name and digest; the fault point "adapter" makes it refuse."""
        machine = self._running()
        if self._settings.adapters is None:
            raise NotSupported("this engine was started without adapters")
        try:
            await machine.faults.reach("adapter", adapter.name)
        except FaultInjected as fault:
            raise AdapterRefused(str(fault), adapter=adapter.name) from None
        self._adapters.add(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See the port."""
        machine = self._running()
        while any(leg.request.adapter == adapter for leg in machine.legs):
            await self._clock.sleep(IDLE_CHECK_S)
        self._adapters.discard(adapter)

    async def canary(self) -> None:
        """See the port. Computes a prompt of one token."""
        machine = self._running()
        canary = EngineRequest(
            request_id=f"canary-{next(self._canaries)}",
            token_ids=(0,),
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_tokens=1),
        )
        try:
            await machine.faults.reach("canary", canary.request_id)
        except FaultInjected as fault:
            raise EngineFailed(str(fault)) from None
        output = BatchQueue()
        machine.begin(canary, output)
        try:
            while (await output.read()).finish is None:
                pass
        finally:
            machine.abort(canary.request_id)

    def abort(self, request_id: str) -> bool:
        """See the port."""
        return self._machine is not None and self._machine.abort(request_id)

    async def load(self) -> EngineLoad:
        """See the port."""
        machine = self._running()
        return load(machine.legs, machine.pool, machine.scheduler.chunked)

    async def flush_cache(self) -> bool:
        """See the port. Refused while requests run."""
        return self._running().pool.flush()

    def kv_cache(self) -> KvCacheMirror:
        """See the port."""
        mirror = self._running().kv_mirror
        if mirror is None:
            raise NotSupported("this simulated engine was started without a prefix cache or without KV events")
        return mirror

    async def read_kv_cache(self) -> KvSnapshot:
        """See the port. Reads the pool, not its mirror."""
        sequence = self.kv_cache().sequence
        return KvSnapshot(sequence=sequence, block_hashes=self._running().pool.cached_names())

    async def start_profile(self, directory: Path, *, steps_max: int, with_stack: bool) -> None:
        """See the port."""
        raise NotSupported("the simulated engine has no profiler", field="format")

    async def stop_profile(self) -> None:
        """See the port."""
        raise AssertionError("stop_profile() before start_profile()")

    def stalled(self) -> str | None:
        """See the port. Always None: the engine runs in this process, so a stopped engine cannot be asked."""
        return None

    def handover_trouble(self) -> str | None:
        """See the port. Always None: legs are handed over by this process's event loop."""
        return None

    def dropped_messages(self) -> Mapping[DropReason, int]:
        """See the port."""
        return {}

    async def wait_failed(self) -> str:
        """See the port. Returns when an injected fault or an internal error has ended the engine."""
        return await asyncio.shield(self._running().failed)

    def _running(self) -> Machine:
        if self._machine is None:
            raise EngineFailed("the simulated engine is not running")
        if self._machine.failed.done():
            raise EngineFailed(self._machine.failed.result())
        return self._machine

    def _check(self, request: EngineRequest, machine: Machine) -> None:
        capabilities = self.capabilities()
        tokens, stopping = request.token_ids, request.stopping
        if not tokens:
            raise InvalidRequest("token_ids", "must not be empty")
        if not all(0 <= t < capabilities.vocabulary_size for t in tokens):
            raise InvalidRequest("token_ids", f"must all be 0 to {capabilities.vocabulary_size - 1}")
        longest = capabilities.context_tokens_max - 1
        if len(tokens) > longest:
            problem = f"has {len(tokens)} tokens, more than the {longest} that fit into the context"
            raise ContextExceeded("token_ids", problem, limit=longest + 1)
        if request.top_logprobs is not None and not 0 <= request.top_logprobs <= TOP_LOGPROBS_MAX:
            raise InvalidRequest("logprobs.top_logprobs", f"must be 0 to {TOP_LOGPROBS_MAX}")
        if stopping.max_tokens < 1:
            raise InvalidRequest("stopping.max_tokens", f"must be at least 1, not {stopping.max_tokens}")
        if (stopping.min_tokens or 0) > stopping.max_tokens:
            problem = f"must be at most max_tokens ({stopping.max_tokens}), not {stopping.min_tokens}"
            raise InvalidRequest("stopping.min_tokens", problem)
        if (request.bootstrap is None) != (self._settings.role is WorkerRole.AGGREGATED):
            expected = "must be absent" if request.bootstrap else "is required"
            raise InvalidRequest("bootstrap", f"{expected} on an engine in role {self._settings.role.value}")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ModelNotFound(f"adapter {request.adapter.name} is not loaded", model=request.adapter.name)
        if machine.knows(request.request_id):
            raise InvalidRequest("request_id", f"{request.request_id} is already running on this engine")
        if request.guided is not None:
            raise NotSupported("the simulated engine does not support guided decoding", field="guided")

    def _describe(self, checkpoint: Checkpoint) -> Capabilities:
        settings = self._settings
        dtype = settings.dtype
        if dtype == "auto":
            dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
        if dtype not in ELEMENT_BYTES:
            raise StartError(f"{checkpoint.path / 'config.json'}: the simulated engine does not support dtype {dtype}")
        aggregated = settings.role is WorkerRole.AGGREGATED
        page = self._options.page_size_tokens
        kv_capacity_tokens = (settings.kv_capacity_tokens or KV_CAPACITY_TOKENS) // page * page
        return Capabilities(
            engine="simulated",
            engine_version=tandem.__version__,
            model=settings.model_name,
            model_digest=_model_digest(checkpoint, self._options.weights),
            tokenizer_digest=checkpoint.tokenizer_digest,
            context_tokens_max=min(checkpoint.context_tokens_max, kv_capacity_tokens),
            kv_capacity_tokens=kv_capacity_tokens,
            running_requests_max=settings.running_requests_max or RUNNING_REQUESTS_MAX,
            vocabulary_size=checkpoint.vocabulary_size,
            eos_token_ids=checkpoint.eos_token_ids,
            page_size_tokens=page,
            kv_dtype=dtype,
            kv_layout=checkpoint.kv_layout,
            kv_bytes_per_token=checkpoint.kv_bytes_per_token(ELEMENT_BYTES[dtype]),
            transfer_backend="none" if aggregated else TRANSFER_BACKENDS[settings.transfer_backend],
            is_mla=checkpoint.is_mla,
            **embedding_capabilities(settings, checkpoint),
        )


def _model_digest(checkpoint: Checkpoint, weights: str | None) -> str:
    """Of the checkpoint, or of that with other weights."""
    if weights is None:
        return checkpoint.model_digest
    return hashlib.sha256(f"{checkpoint.model_digest} {weights}".encode()).hexdigest()
