"""The models of the registry's view: which are served, which are refused, and which model a name in a request means.

Owns when a model is loaded and when it ends. It is loaded when its first worker appears, and ends once its last worker
has left for model_linger_s: requests that run then end first, new ones are refused by its name. `opening` does both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.worker import Start, Worker, WorkerState
from tandem.errors import InvalidRequest, ModelNotFound, NoWorkers, ServiceError, StartError, TandemError
from tandem.service.background import log_failure
from tandem_frontend.admission.open_requests import OpenRequests
from tandem_frontend.call_context import Caller
from tandem_frontend.models.listing import listed_model
from tandem_frontend.models.model_pipeline import ModelPipeline
from tandem_frontend.models.naming_rules import NamingRules
from tandem_frontend.models.opening import OpenedModel
from tandem_frontend.preparation.served_model import check_name_length

log = logging.getLogger(__name__)

RETRY_S, RETRY_MAX_S = 10.0, 300.0
"""Time after which a model is loaded again whose workers could not be asked for its files; doubled each time."""
LOADING_WAIT_S = 10.0
"""Longest wait of a request for a model that is being loaded, which takes a second where its worker is healthy."""
START_WAIT_S = 5.0
"""Longest wait of a start for the models of the first view."""
NAMED_MAX = 32
"""Models that an error lists."""

Open = Callable[[str, Sequence[Worker]], AbstractAsyncContextManager[OpenedModel]]


class Status(Enum):
    """What becomes of requests for a model."""

    LOADING = pb.MODEL_STATE_LOADING
    """They wait."""
    SERVING = pb.MODEL_STATE_SERVING
    REFUSED = pb.MODEL_STATE_REFUSED
    LEAVING = None
    """Open ones end, new ones are refused: its workers have left."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One model."""

    name: str
    starts: frozenset[Start]
    """Its workers when loading began."""
    is_own: bool
    """Of the setting `model`: served also without a worker."""
    status: Status = Status.LOADING
    opened: OpenedModel | None = None
    failure: TandemError | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """It is not being loaded any more."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """It must end."""
    timer: asyncio.TimerHandle | None = None
    """Ends it, or loads it again."""
    task: asyncio.Task[None] | None = None
    retries: int = 0
    last_failure: str = ""


class ModelCatalog:
    """The models of one process."""

    def __init__(
        self, open_model: Open, requests: OpenRequests, rules: NamingRules, linger_s: float,
        on_change: Callable[[bool], None] = lambda knows_workers: None,
        on_unknown: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """No model yet.

        Args:
            open_model: serves a model while its context is entered.
            requests: is charged for calls that generate nothing.
            rules: see there.
            linger_s: seconds for which a model stays without a worker, so that its workers may all be restarted.
            on_change: called with whether a model that is served has workers, when that may have changed.
            on_unknown: called for each request whose model is not found.
        """
        self._open_model = open_model
        self._requests = requests
        self._rules = rules
        self._linger_s = linger_s
        self._on_change = on_change
        self._on_unknown = on_unknown
        self.on_open: Callable[[OpenedModel], None] = lambda opened: None
        """Called with each model that is served from now on."""
        self._entries: dict[str, _Entry] = {}
        self._active: set[_Entry] = set()
        """Those that are loaded, served or leaving: at most models_max, and the frontend's own."""
        self._without_room: dict[str, None] = {}
        """Names of those that were refused because there are so many, in order."""
        self._view: dict[str, tuple[Worker, ...]] = {}
        self._bases: dict[str, str] = {}
        """Names of models by those of their adapters in the view that requests can name."""
        self._hidden: set[str] = set()
        """Names of adapters that are aliases here."""
        self._is_closed = False

    @property
    def opened(self) -> Sequence[OpenedModel]:
        """The models that have a pipeline, also those that are leaving."""
        return [entry.opened for entry in self._entries.values() if entry.opened is not None]

    @property
    def refused_count(self) -> int:
        """Models of the view that are not served."""
        return sum(entry.status is Status.REFUSED for entry in self._entries.values())

    async def keep(self, name: str) -> OpenedModel:
        """Serve a model of this frontend's own, whether it has workers or not.

        Raises:
            TandemError: it cannot be served.
        """
        entry = self._begin(name, (), is_own=True)
        await entry.settled.wait()
        if entry.failure is not None:
            raise entry.failure
        assert entry.opened is not None, "a model that is settled is open or refused"
        return entry.opened

    def follow(self, workers: Iterable[Worker]) -> None:
        """Apply a new view: begin to load what is new, and to leave what has no worker."""
        view: dict[str, list[Worker]] = {}
        for worker in workers:
            view.setdefault(worker.capabilities.model, []).append(worker)
        self._view = {name: tuple(its) for name, its in view.items()}
        self._bases = self._adapters_of(view)
        for entry in [*self._entries.values()]:
            if not entry.is_own:
                self._compare(entry, self._view.get(entry.name, ()))
        self._load_missing()
        self._tell()

    def _adapters_of(self, view: Mapping[str, Sequence[Worker]]) -> dict[str, str]:
        """The model of each adapter that requests can name. Models come first, then aliases: a load at run time must
        not take over a name that this frontend's settings have given a meaning.
        """
        # Of two models with an adapter of one name, the first by name has it.
        bases = {
            adapter.name: name
            for name in sorted(view, reverse=True)
            for worker in view[name]
            for adapter in worker.adapters
            if adapter.name not in view
        }
        hidden = {name for name in bases if self._rules.aliases.get(name, name) != name}
        for name in sorted(hidden - self._hidden):
            log.warning(
                "adapter %s cannot be requested here: its name is an alias of %s", name, self._rules.aliases[name]
            )
        self._hidden = hidden
        return {name: base for name, base in bases.items() if name not in hidden}

    async def wait_settled(self) -> None:
        """Return when no model of the present view is being loaded, or after START_WAIT_S: others must not wait for a
        model whose workers cannot be reached.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_WAIT_S):
                for entry in [*self._entries.values()]:
                    await entry.settled.wait()

    async def close(self) -> None:
        """End all models at once; open requests have ended, or end with them."""
        self._is_closed = True
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for entry in self._entries.values():
            _stop_timer(entry)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._entries.clear()

    async def find(self, name: str | None) -> ModelPipeline:
        """See `models.model_pipeline.Models`."""
        adapter = await self._find_adapter(self._rules.default if name is None else name)
        if adapter is not None:
            return adapter
        entry = self._wanted(name)
        if entry.status is Status.LOADING:
            await _wait_loaded(entry)
        if entry.status is Status.SERVING and entry.opened is not None:
            return entry.opened.pipeline
        if entry.status is Status.LEAVING and self._view.get(entry.name):
            raise NoWorkers(f"this frontend loads model {entry.name} again", role="any", model=entry.name)
        self._on_unknown()
        why = "its workers have left" if entry.failure is None else "the list of models says why"
        raise ModelNotFound(f"model {entry.name!r} is not served by this frontend: {why}", model=name or entry.name)

    async def _find_adapter(self, name: str | None) -> ModelPipeline | None:
        """The pipeline of the adapter of that name or alias; None: it names no adapter. See `_adapters_of`."""
        if name is None or name in self._entries:
            return None
        base = self._bases.get(name)
        if base is None:
            name = self._rules.aliases.get(name, "")
            base = None if name in self._entries else self._bases.get(name)
        entry = None if base is None else self._entries.get(base)
        if entry is None:
            return None
        if entry.status is Status.LOADING:
            await _wait_loaded(entry)
        is_served = entry.status is Status.SERVING and entry.opened is not None
        return entry.opened.adapters.find(name) if is_served and entry.opened is not None else None

    def listed(self) -> list[pb.Model]:
        """See `models.model_pipeline.Models`."""
        found = []
        for name, entry in sorted(self._entries.items()):
            workers = [one for one in self._view.get(name, ()) if one.state is WorkerState.SERVING]
            if workers and entry.status is not Status.LEAVING:
                aliases = sorted(alias for alias, meant in self._rules.aliases.items() if meant == name)
                model = listed_model(name, workers, None if entry.opened is None else entry.opened.pipeline.model)
                model.state = entry.status.value
                model.aliases.extend(
                    alias for alias in aliases if alias not in self._entries.keys() | self._bases.keys()
                )
                model.problem = "" if entry.failure is None else str(entry.failure)
                found.append(model)
                found += self._listed_adapters(entry)
        return sorted(found, key=lambda model: model.name)

    def _listed_adapters(self, entry: _Entry) -> list[pb.Model]:
        """The adapters of a model that requests can name."""
        if entry.opened is None:
            return []
        listed = [model for model in entry.opened.adapters.listed() if self._bases.get(model.name) == entry.name]
        for model in listed:
            names = sorted(alias for alias, meant in self._rules.aliases.items() if meant == model.name)
            model.aliases.extend(name for name in names if name not in self._entries and name not in self._bases)
        return listed

    def charge(self, caller: Caller) -> None:
        """See `models.model_pipeline.Models`."""
        self._requests.charge(caller.fairness_id)

    def _wanted(self, name: str | None) -> _Entry:
        name = self._rules.default if name is None else name
        if name is None:
            return self._only()
        entry = self._entries.get(name)
        if entry is None or entry.status is Status.REFUSED:
            # A model that is refused takes no alias away from one that is served.
            entry = self._entries.get(self._rules.aliases.get(name, "")) or entry
        if entry is None:
            check_name_length(name)
            self._on_unknown()
            raise ModelNotFound(f"model {name!r} not found; this frontend serves {self._names() or 'none'}", model=name)
        return entry

    def _only(self) -> _Entry:
        """The model of a request that names none."""
        entries = [entry for entry in self._entries.values() if entry.status in (Status.LOADING, Status.SERVING)]
        if not entries:
            raise NoWorkers("no model is served: no worker is alive", role="any")
        # One that has just lost its last worker is no choice beside one that has workers.
        likely = [entry for entry in entries if self._view.get(entry.name)] or entries
        if len(likely) > 1:
            raise InvalidRequest("model", f"must be given: this frontend serves {self._names()}")
        return likely[0]

    def _names(self) -> str:
        """The models that may be asked for, and some of them where there are many."""
        served = {name for name, entry in self._entries.items() if entry.status in (Status.LOADING, Status.SERVING)}
        names = sorted(served | {name for name, base in self._bases.items() if base in served})
        more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
        return ", ".join(repr(name) for name in names[:NAMED_MAX]) + more

    def _compare(self, entry: _Entry, workers: Collection[Worker]) -> None:
        """What a new view means for a model that is known."""
        if not workers:
            if entry.status is Status.REFUSED:
                self._forget(entry)
            elif entry.timer is None and entry.status is not Status.LEAVING:
                entry.timer = asyncio.get_running_loop().call_later(self._linger_s, self._leave, entry)
            return
        if entry.status is Status.REFUSED:
            if entry.name not in self._without_room and {worker.start for worker in workers} != entry.starts:
                # Other files may come with other workers, or the damaged ones have left.
                self._forget(entry)
            return
        _stop_timer(entry)
        if entry.status is Status.SERVING and entry.opened is not None:
            own = entry.opened.pipeline.model.tokenizer.digest
            if all(worker.capabilities.tokenizer_digest != own for worker in workers):
                log.info("all workers of model %s have another tokenizer now: it is loaded again", entry.name)
                self._leave(entry)

    def _load_missing(self) -> None:
        """Load what is new, or refuse it where there are as many models as there may be."""
        if self._is_closed:
            return
        new = [name for name in self._view if name not in self._entries]
        for name in new:
            self._begin(name, self._view[name])
        refused = [name for name in new if name in self._without_room]
        if refused:
            more = f" and {len(refused) - NAMED_MAX} more" if len(refused) > NAMED_MAX else ""
            log.error(
                "this frontend serves %d models, its limit (models_max); not served: %s%s",
                len(self._active), ", ".join(refused[:NAMED_MAX]), more,
            )  # fmt: skip

    def _begin(self, name: str, workers: Sequence[Worker], *, is_own: bool = False) -> _Entry:
        entry = self._entries[name] = _Entry(name, frozenset(worker.start for worker in workers), is_own)
        if len(self._active) < self._rules.models_max:
            self._load(entry, workers)
        else:
            self._without_room[name] = None
            entry.status = Status.REFUSED
            entry.failure = ServiceError(f"this frontend serves {len(self._active)} models, its limit (models_max)")
            entry.settled.set()
        return entry

    def _load(self, entry: _Entry, workers: Sequence[Worker]) -> None:
        entry.status, entry.failure = Status.LOADING, None
        entry.starts = frozenset(worker.start for worker in workers)
        entry.settled.clear()
        self._active.add(entry)
        entry.task = asyncio.create_task(self._hold(entry, workers), name=f"model-{entry.name}")
        entry.task.add_done_callback(log_failure)

    async def _hold(self, entry: _Entry, workers: Sequence[Worker]) -> None:
        """Load a model and serve it until it must leave."""
        try:
            async with self._open_model(entry.name, workers) as opened:
                entry.opened = opened
                self.on_open(opened)
                if entry.status is Status.LOADING:
                    entry.status = Status.SERVING
                    log.info("model %s is served", entry.name)
                entry.settled.set()
                self._tell()
                await entry.left.wait()
                await opened.admission.wait_none()
        except Exception as problem:  # a model's files may break anything, and must not keep its place for ever
            self._refuse(entry, problem)
            return
        finally:
            entry.opened = None
            entry.settled.set()
        log.info("model %s has ended: no worker has it", entry.name)
        self._forget(entry)
        self._load_missing()

    def _refuse(self, entry: _Entry, problem: Exception) -> None:
        """A model could not be loaded. It is tried again where the cause may pass by itself."""
        _stop_timer(entry)
        known = problem if isinstance(problem, TandemError) else _internal(entry.name, problem)
        is_repeated = entry.last_failure == str(known)
        entry.status, entry.failure, entry.last_failure = Status.REFUSED, known, str(known)
        self._active.discard(entry)
        entry.settled.set()
        if not entry.is_own:
            log.log(logging.DEBUG if is_repeated else logging.ERROR, "model %s is not served: %s", entry.name, known)
            if not self._view.get(entry.name):
                self._forget(entry)
            elif isinstance(known, ServiceError):
                delay_s = min(RETRY_MAX_S, RETRY_S * 2**entry.retries)
                entry.retries += 1
                entry.timer = asyncio.get_running_loop().call_later(delay_s, self._retry, entry)
        self._fill_room()
        self._tell()

    def _retry(self, entry: _Entry) -> None:
        entry.timer = None
        workers = self._view.get(entry.name, ())
        if len(self._active) < self._rules.models_max:
            self._load(entry, workers)
        else:
            self._without_room[entry.name] = None

    def _leave(self, entry: _Entry) -> None:
        """Refuse new requests from now on; the model ends with the last open one."""
        _stop_timer(entry)
        if entry.status is Status.REFUSED:
            self._forget(entry)
            return
        entry.status = Status.LEAVING
        entry.left.set()
        self._tell()

    def _forget(self, entry: _Entry) -> None:
        """Remove an ended or refused model. One that had no room gets it."""
        _stop_timer(entry)
        self._active.discard(entry)
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
            self._without_room.pop(entry.name, None)
        self._fill_room()

    def _fill_room(self) -> None:
        """Load models that were refused for want of room, as many as fit now."""
        while self._without_room and len(self._active) < self._rules.models_max and not self._is_closed:
            name = next(iter(self._without_room))
            del self._without_room[name]
            entry, workers = self._entries.get(name), self._view.get(name, ())
            if entry is not None and workers:
                self._load(entry, workers)

    def _tell(self) -> None:
        self._on_change(any(entry.status is Status.SERVING and self._view.get(entry.name) for entry in self._active))


def _internal(name: str, problem: Exception) -> TandemError:
    """The error of a model whose files broke a library in an unexpected way."""
    log.error("bug in this frontend while model %s was loaded; other models are not affected", name, exc_info=problem)
    return StartError(f"its files cannot be used: {type(problem).__name__}")


async def _wait_loaded(entry: _Entry) -> None:
    try:
        async with asyncio.timeout(LOADING_WAIT_S):
            await entry.settled.wait()
    except TimeoutError:
        raise NoWorkers(f"this frontend still loads model {entry.name}", role="any", model=entry.name) from None


def _stop_timer(entry: _Entry) -> None:
    if entry.timer is not None:
        entry.timer.cancel()
        entry.timer = None
