"""The adapters of a worker: which are loaded in its engine, and which of those it serves.

Owns the order of a load (files, engine, registration) and of an unload (registration, open legs, engine), and that a
caller names no directory outside adapter_root. Served adapters are a part of the worker's description, which frontends
read from the registry; they change within one epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from tandem.domain.adapter import ADAPTERS_MAX, NAME_RULE, Adapter, is_name, read_adapter
from tandem.engine.port import Engine
from tandem.engine.settings import AdapterPlaces
from tandem.errors import AdapterRefused, InvalidRequest, NotSupported, StartError, TandemError
from tandem.worker.identity import Identity
from tandem.worker.legs import Legs

log = logging.getLogger(__name__)

CONFIRM_TIMEOUT_S = 5.0
PATH_CHARS_MAX = 1024


async def load_first(engine: Engine, places: AdapterPlaces, wanted: Mapping[str, Path]) -> tuple[Adapter, ...]:
    """Load the adapters of the settings into a started engine, before the worker registers.

    Raises:
        StartError: names the adapter as `adapters.NAME`.
    """
    found = []
    for name, path in sorted(wanted.items()):
        try:
            adapter = await _read(name, path, places)
            await engine.load_adapter(adapter, path)
        except TandemError as problem:
            raise StartError(f"adapters.{name}: {problem}") from None
        found.append(adapter)
    return tuple(found)


async def check_files(places: AdapterPlaces, adapter: Adapter, path: Path) -> None:
    """Read the files of a loaded adapter again, for another engine to load.

    Raises:
        AdapterRefused: they cannot be loaded any more, or have other weights.
    """
    why = "its files are not those any more that were loaded"
    try:
        if await _read(adapter.name, path, places) == adapter:
            return
    except (StartError, OSError) as problem:
        why = str(problem) if isinstance(problem, StartError) else f"its files cannot be read: {problem.strerror}"
    raise AdapterRefused(f"adapter {adapter.name} cannot be loaded again: {why}", adapter=adapter.name)


async def _read(name: str, path: Path, places: AdapterPlaces) -> Adapter:
    limits = places.limits
    if limits is None:
        raise NotSupported("this worker was started without adapters (adapters, adapter_root)")
    return await asyncio.to_thread(read_adapter, name, path, places.model, limits.rank_max, limits.modules)


class Adapters:
    """Loads, serves and unloads adapters, one change at a time."""

    def __init__(
        self, engine: Engine, identity: Identity, legs: Legs, places: AdapterPlaces, first: tuple[Adapter, ...] = ()
    ) -> None:
        """`first` are loaded already, and served."""
        self._engine = engine
        self._identity = identity
        self._legs = legs
        self._places = places
        self._loaded = {adapter.name: adapter for adapter in first}
        self._lock = asyncio.Lock()
        self._unloading: dict[str, asyncio.Task[bool]] = {}
        self._loading: set[asyncio.Task[tuple[Adapter, bool]]] = set()

    async def load(self, name: str, path: str) -> tuple[Adapter, bool]:
        """Load an adapter without serving it. Returns it, and whether it was loaded before.

        Goes on when the caller is cancelled: the engine would load it all the same, unknown to the worker.

        Raises:
            InvalidRequest: a field is wrong.
            AdapterRefused: it cannot be loaded here; nothing has changed.
            NotSupported: this worker has no adapters.
        """
        _check_name(name)
        task = asyncio.create_task(self._load(name, self._directory(name, path)), name=f"load-{name}")
        self._loading.add(task)
        task.add_done_callback(self._note_loaded)
        return await asyncio.shield(task)

    def _note_loaded(self, ended: asyncio.Task[tuple[Adapter, bool]]) -> None:
        self._loading.discard(ended)
        if not ended.cancelled() and (problem := ended.exception()) is not None:
            log.warning("an adapter was not loaded: %s", problem)

    async def _load(self, name: str, directory: Path) -> tuple[Adapter, bool]:
        async with self._lock:
            try:
                adapter = await _read(name, directory, self._places)
            except StartError as problem:
                raise self._refused(name, str(problem)) from None
            known = self._loaded.get(name)
            if known == adapter:
                return adapter, True
            if known is not None and name in self._unloading:
                # Its open legs may take minutes to end, and other changes would wait for them too.
                raise self._refused(name, "the former one of that name is still being unloaded")
            if known is not None and known in self._identity.current().adapters:
                raise self._refused(name, "it serves another adapter of that name: unload that one first")
            if known is not None:
                # Of a load that was never completed.
                await self._release(known)
            if len(self._loaded) >= ADAPTERS_MAX:
                raise self._refused(name, f"it has {ADAPTERS_MAX} adapters, the most that a worker may have")
            await self._engine.load_adapter(adapter, directory)
            self._loaded[name] = adapter
            log.info("loaded adapter %s (%s)", name, adapter.digest[:12])
            return adapter, False

    def serves(self, adapter: Adapter) -> bool:
        """Whether frontends may send legs of it."""
        return adapter in self._identity.current().adapters

    def forget_all_but(self, loaded: Collection[Adapter]) -> None:
        """The engine has only these: a role change has dropped the others."""
        self._loaded = {name: adapter for name, adapter in self._loaded.items() if adapter in loaded}

    async def serve(self, name: str, *, serve: bool) -> None:
        """Serve a loaded adapter, or stop to serve it; returns when the registry has confirmed it.

        Raises:
            AdapterRefused: it is not loaded, or no registry has confirmed it: it is served, or not, as before.
        """
        _check_name(name)
        async with self._lock:
            adapter, former = self._loaded.get(name), self._identity.current().adapters
            if adapter is None:
                if serve:
                    raise self._refused(name, "it is not loaded")
                return
            others = tuple(one for one in former if one.name != name)
            wanted = tuple(sorted((*others, adapter))) if serve else others
            if not await self._identity.serve(wanted, CONFIRM_TIMEOUT_S):
                # Without those that a role change has dropped meanwhile.
                kept = tuple(one for one in former if self._loaded.get(one.name) == one)
                await self._identity.serve(kept, 0.0)
                raise self._refused(name, "no registry of this release has confirmed it")

    async def unload(self, name: str) -> bool:
        """Stop to serve an adapter, wait for its open legs, and release it. Returns whether it was loaded.

        Goes on when the caller is cancelled.

        Raises:
            AdapterRefused: the engine did not release it; it is not served any more.
        """
        _check_name(name)
        task = self._unloading.get(name)
        if task is None:
            task = self._unloading[name] = asyncio.create_task(self._unload(name), name=f"unload-{name}")
            task.add_done_callback(lambda ended: self._forget(name, ended))
        return await asyncio.shield(task)

    def _forget(self, name: str, ended: asyncio.Task[bool]) -> None:
        del self._unloading[name]
        if not ended.cancelled() and (problem := ended.exception()) is not None:
            log.warning("adapter %s was not released: %s", name, problem)

    async def _unload(self, name: str) -> bool:
        async with self._lock:
            adapter = self._loaded.get(name)
            if adapter is None:
                return False
            served = self._identity.current().adapters
            if adapter in served:
                # New legs are refused from now on, whether a registry has heard of it or not.
                await self._identity.serve(tuple(one for one in served if one.name != name), CONFIRM_TIMEOUT_S)
        await self._legs.wait_none_of(adapter)
        async with self._lock:
            if self._loaded.get(name) == adapter and not self.serves(adapter):
                await self._release(adapter)
        return True

    async def _release(self, adapter: Adapter) -> None:
        await self._engine.unload_adapter(adapter)
        self._loaded.pop(adapter.name, None)
        log.info("unloaded adapter %s (%s)", adapter.name, adapter.digest[:12])

    def _directory(self, name: str, path: str) -> Path:
        """The directory that a caller names, which must be below adapter_root."""
        root = self._places.root
        if root is None:
            raise self._refused(name, "it loads no adapters at run time (adapter_root is not set)")
        if not 1 <= len(path) <= PATH_CHARS_MAX or not path.isprintable():
            raise InvalidRequest("path", f"must be 1 to {PATH_CHARS_MAX} printable characters")
        resolved = (root / path).resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise InvalidRequest("path", "must be below the worker's adapter_root")
        return resolved

    def _refused(self, name: str, why: str) -> AdapterRefused:
        worker_id = self._identity.current().worker_id
        return AdapterRefused(f"adapter {name} at worker {worker_id}: {why}", adapter=name, worker=worker_id)


def _check_name(name: str) -> None:
    if not is_name(name):
        raise InvalidRequest("name", NAME_RULE)
