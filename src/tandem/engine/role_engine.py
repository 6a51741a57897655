"""A worker's engine whose role can change: an `Engine` that passes everything on to the engine of the present role.

Owns the choice between a switch in place and an engine started anew, and that the death of an engine which is being
replaced is no failure. Does not drain: no request may be open while the role changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from tandem.domain.adapter import Adapter
from tandem.domain.generation import EngineRequest
from tandem.domain.handover import DropReason
from tandem.domain.worker import Capabilities, EngineLoad, WorkerRole
from tandem.engine.port import BootstrapAddress, Engine, KvCache, KvSnapshot, Output
from tandem.errors import AdapterRefused, ConfigError, EngineFailed, NotSupported, RoleChangeRefused

log = logging.getLogger(__name__)


class RoleEngine:
    """An `Engine`; see the port."""

    def __init__(
        self,
        make: Callable[[WorkerRole], Engine],
        role: WorkerRole,
        check_files: Callable[[Adapter, Path], Awaitable[None]] | None = None,
    ) -> None:
        """Construct the first engine.

        Args:
            make: constructs an engine for a role, without starting it.
            role: the first role.
            check_files: raises AdapterRefused when a directory has not that adapter any more; None: none changes.

        Raises:
            ConfigError: of `make`.
        """
        self._make = make
        self._check_files = check_files
        self._engine = make(role)
        self._is_usable = True
        """Whether the present engine may be asked to switch: it runs, and no switch of it has failed."""
        self._adapters: dict[Adapter, Path] = {}
        """Loaded ones and their directories: another engine loads them again."""
        self._lock = asyncio.Lock()
        """Held over each change of role or adapters: an adapter must not miss the engine that replaces another one."""
        self._changing = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()

    def problem_of(self, role: WorkerRole) -> str | None:
        """Why no engine with these settings can have a role; None: one can be constructed."""
        try:
            self._make(role)
        except ConfigError as problem:
            return str(problem)
        return None

    async def change_role(self, role: WorkerRole, *, may_switch: bool = True) -> bool:
        """Take another role, in place where the engine can, else with another engine. Returns whether in place.

        Args:
            role: the new role.
            may_switch: whether the present engine may stay; False: another one is started in any case, and adapters
                that it cannot load are dropped (`adapters`).

        Raises:
            AdapterRefused: the other engine did not load an adapter. Call this again as after StartError.
            RoleChangeRefused: another engine could not load an adapter. The present one goes on as before.
            StartError: the other engine did not start. There is no engine now: call this again, with the former role
                and without `may_switch`.
        """
        async with self._lock:
            self._settled.clear()
            self._changing.set()
            try:
                if may_switch and self._is_usable and await self._switches(role):
                    return True
                if may_switch and self._is_usable:
                    await self._check_adapters(role)
                await self._replace(role, must_have_all=may_switch)
                return False
            finally:
                self._changing.clear()
                self._settled.set()

    async def _switches(self, role: WorkerRole) -> bool:
        try:
            await self._engine.switch_role(role)
        except NotSupported as reason:
            log.info("starting another engine for role %s: %s", role.value, reason)
            return False
        except EngineFailed as problem:
            log.error("the engine did not take role %s in place, starting another one: %s", role.value, problem)
            self._is_usable = False
            return False
        return True

    async def _check_adapters(self, role: WorkerRole) -> None:
        """Refuse the change while there still is an engine that has all adapters."""
        for adapter, path in self._adapters.items():
            try:
                await self._check(adapter, path)
            except AdapterRefused as problem:
                raise RoleChangeRefused(str(problem), role=role.value) from None

    async def _check(self, adapter: Adapter, path: Path) -> None:
        if self._check_files is not None:
            await self._check_files(adapter, path)

    async def _replace(self, role: WorkerRole, *, must_have_all: bool) -> None:
        engine = self._make(role)
        self._is_usable = False
        await self._engine.stop()
        self._engine = engine
        await engine.start()
        for adapter, path in [*self._adapters.items()]:
            try:
                # Again, because an engine may take minutes to start.
                await self._check(adapter, path)
                await engine.load_adapter(adapter, path)
            except AdapterRefused as problem:
                if must_have_all:
                    raise
                log.error("the worker goes on without adapter %s: %s", adapter.name, problem)
                del self._adapters[adapter]
        self._is_usable = True

    def adapters(self) -> frozenset[Adapter]:
        """Those that the engine has loaded."""
        return frozenset(self._adapters)

    # --- The port

    async def start(self) -> None:
        """See the port."""
        await self._engine.start()

    async def stop(self) -> None:
        """See the port."""
        await self._engine.stop()

    async def switch_role(self, role: WorkerRole) -> None:
        """See the port."""
        await self._engine.switch_role(role)

    def capabilities(self) -> Capabilities:
        """See the port."""
        return self._engine.capabilities()

    def bootstrap_address(self) -> BootstrapAddress | None:
        """See the port."""
        return self._engine.bootstrap_address()

    async def submit(self, request: EngineRequest, output: Output) -> None:
        """See the port."""
        await self._engine.submit(request, output)

    async def load_adapter(self, adapter: Adapter, path: Path) -> None:
        """See the port. Waits for a role change to end."""
        async with self._lock:
            if not self._is_usable:
                raise EngineFailed(f"adapter {adapter.name} is not loaded: a role change has left no engine")
            await self._engine.load_adapter(adapter, path)
            self._adapters[adapter] = path

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See the port. Waits for a role change to end."""
        async with self._lock:
            if self._is_usable:
                await self._engine.unload_adapter(adapter)
            self._adapters.pop(adapter, None)

    async def canary(self) -> None:
        """See the port."""
        await self._engine.canary()

    def abort(self, request_id: str) -> bool:
        """See the port."""
        return self._engine.abort(request_id)

    async def load(self) -> EngineLoad:
        """See the port."""
        return await self._engine.load()

    async def flush_cache(self) -> bool:
        """See the port."""
        return await self._engine.flush_cache()

    def kv_cache(self) -> KvCache:
        """See the port."""
        return self._engine.kv_cache()

    async def read_kv_cache(self) -> KvSnapshot:
        """See the port."""
        return await self._engine.read_kv_cache()

    async def start_profile(self, directory: Path, *, steps_max: int, with_stack: bool) -> None:
        """See the port."""
        await self._engine.start_profile(directory, steps_max=steps_max, with_stack=with_stack)

    async def stop_profile(self) -> None:
        """See the port."""
        await self._engine.stop_profile()

    def stalled(self) -> str | None:
        """See the port."""
        return self._engine.stalled()

    def handover_trouble(self) -> str | None:
        """See the port."""
        return self._engine.handover_trouble()

    def dropped_messages(self) -> Mapping[DropReason, int]:
        """See the port. Begins at zero again with another engine."""
        return self._engine.dropped_messages()

    async def wait_failed(self) -> str:
        """See the port. An engine that dies while the role changes is replaced, or the change fails."""
        while True:
            await self._settled.wait()
            if not self._is_usable:
                # A change has failed, and left no engine: the next one brings one.
                await self._changing.wait()
                continue
            failing = asyncio.ensure_future(self._engine.wait_failed())
            changing = asyncio.ensure_future(self._changing.wait())
            try:
                await asyncio.wait({failing, changing}, return_when=asyncio.FIRST_COMPLETED)
                if not self._changing.is_set() and failing.done():
                    return failing.result()
            finally:
                failing.cancel()
                changing.cancel()
