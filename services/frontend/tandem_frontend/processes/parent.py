"""The parent of a frontend's processes: the frontend's port, its place in the registry, its metrics, and their end.

Start: port, metrics, processes, and, once one of them serves, its place in the registry. Drain: DRAINING in the
registry, then each process as a frontend by itself, then out of the registry. Imports nothing of what serves requests.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

import tandem
from tandem.clock import epoch_now
from tandem.discovery import Registration
from tandem.domain.frontend import Frontend, default_frontend_id
from tandem.domain.worker import WorkerState
from tandem.errors import StartError
from tandem.observability.metric_catalog import PROCESS_STATE, Emitter
from tandem.observability.metrics import Metrics, Reading, Together, open_metrics
from tandem.rpc.http2.listener import Listener
from tandem.rpc.listening import check_listenable
from tandem.rpc.process_servicer import held_now
from tandem.rpc.service_host import warn_of_plaintext
from tandem.service import run_directory
from tandem.service.prefork.parent import Prefork
from tandem_frontend.config import PROGRAM, FrontendConfig
from tandem_frontend.processes.identity import ProcessIdentity, metrics_path
from tandem_frontend.processes.shares import settings_of

log = logging.getLogger(__name__)

DIRECTORY_PREFIX = "frontend-"
OWN_LABEL = "parent"
SILENT = "silent"


class FrontendParent:
    """The parent as `tandem.service.process` runs it."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._started_s = time.time()
        self._listener: Listener | None = None
        self._directory: Path | None = None
        self._metrics: Metrics | None = None
        self._prefork: Prefork | None = None
        self._registration: Registration | None = None

    @property
    def address(self) -> str:
        """host:port of the frontend, once started."""
        assert self._listener is not None, "address before start()"
        return f"{self._config.reachable_host}:{self._listener.port}"

    @property
    def metrics_port(self) -> int:
        """Where all processes are scraped, once started; 0: nowhere."""
        return 0 if self._metrics is None else self._metrics.port

    @property
    def _frontend_id(self) -> str:
        return self._config.frontend_id or default_frontend_id(self.address)

    async def start(self) -> None:
        """Return when a process serves; waits for a registry as long as it takes.

        Raises:
            StartError: the port is taken, or what a process says that cannot start.
        """
        config = self._config
        self._listener = self._listen()
        directory = self._directory = run_directory.make_inside(DIRECTORY_PREFIX)
        sockets = {str(number): metrics_path(directory, number) for number in range(config.processes)}
        together = Together(others=sockets, own_label=OWN_LABEL)
        metrics = self._metrics = open_metrics(config, Emitter.PARENT, PROGRAM, config.tls, together=together)
        prefork = self._prefork = Prefork(
            self._command(),
            [self._begin(number, directory) for number in range(config.processes)],
            self._listener,
            drain_s=config.drain_settle_s + config.drain_timeout_s,
            # Where they keep what must not outlive them: the last of them removes it when the parent was killed.
            environment={run_directory.VARIABLE: str(directory)},
            answer=self._answer,
            on_restart=lambda: metrics.count("tandem.process.restarts"),
        )
        metrics.measure(self._read)
        await metrics.start(self._frontend_id)
        log.info("%d processes serve %s", config.processes, self.address)
        await prefork.start()
        await self._register()

    async def drain(self) -> bool:
        """See the module. Returns whether every request ended within the drain's bound."""
        assert self._prefork is not None, "drain() before start()"
        assert self._metrics is not None, "drain() before start()"
        assert self._registration is not None, "drain() before start()"
        self._prefork.begin_drain()
        self._metrics.count("tandem.drains")
        # A registry that cannot be reached is not waited for.
        await self._registration.set_state(WorkerState.DRAINING, 1.0 if self._registration.registered else 0.0)
        try:
            return await self._prefork.drain()
        finally:
            await self._registration.close()

    async def stop(self) -> None:
        """Free everything, also when `start` failed."""
        if self._registration is not None:
            await self._registration.close()
        if self._prefork is not None:
            await self._prefork.stop()
        if self._metrics is not None:
            await self._metrics.stop()
        if self._listener is not None:
            self._listener.close()
        if self._directory is not None:
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def wait_finished(self) -> str | None:
        """Return one sentence when a process has died too often; what the others have then goes on to its end first."""
        assert self._prefork is not None, "wait_finished() before start()"
        sentence = await self._prefork.wait_given_up()
        log.error("%s: the other processes finish what they have", sentence)
        await self.drain()
        return sentence

    def _listen(self) -> Listener:
        host, port = self._config.host, self._config.port
        check_listenable(host, port)
        try:
            listener = Listener(host, port)
        except OSError:
            raise StartError(f"cannot listen on {host}:{port}: the port is in use or not allowed") from None
        if self._config.tls is None:
            warn_of_plaintext(host)
        return listener

    def _command(self) -> list[str]:
        """With the arguments of this one, for people: settings go over the channel."""
        return [sys.executable, "-m", "tandem_frontend", *sys.argv[1:]]

    def _begin(self, number: int, directory: Path) -> Mapping[str, Any]:
        identity = ProcessIdentity(
            number=number,
            count=self._config.processes,
            frontend_id=self._frontend_id,
            address=self.address,
            directory=str(directory),
        )
        settings = settings_of(self._config, number)
        return {"identity": identity.as_dict(), "settings": settings.model_dump(mode="json")}

    def _answer(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        """What only the parent knows: what it holds itself."""
        return {"process": MessageToDict(held_now(self._started_s))}

    async def _register(self) -> None:
        """Begin to be found by edges and tools, as one frontend."""
        config = self._config
        frontend = Frontend(
            frontend_id=self._frontend_id,
            epoch=epoch_now(),
            address=self.address,
            model=config.served_name,
            release=tandem.__version__,
        )
        self._registration = Registration(config.registry, frontend, tls=config.tls, may_be_fenced=False)
        await self._registration.start()

    async def _read(self) -> list[Reading]:
        """What the gauges show."""
        assert self._prefork is not None, "a gauge is read after start()"
        states = Counter(SILENT if child.is_silent else child.state.value for child in self._prefork.children)
        return [
            Reading("tandem.processes", states[state], {PROCESS_STATE.name: state}) for state in PROCESS_STATE.values
        ]
