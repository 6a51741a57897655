"""The parent process of a frontend with several: owns the port, the registration, the metrics and the children.

Start: port, metrics, children and, once one of them serves, the registration. Drain: DRAINING in the registry, then
each child drains like a single frontend, then deregister. Imports nothing that serves requests.
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
        """Port of the Prometheus endpoint for all processes, once started; 0: none."""
        return 0 if self._metrics is None else self._metrics.port

    @property
    def _frontend_id(self) -> str:
        return self._config.frontend_id or default_frontend_id(self.address)

    async def start(self) -> None:
        """Return when a child serves; waits for a registry without a timeout.

        Raises:
            StartError: the port is in use, or a child could not start.
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
            # Directory of files that must not outlive the children: the last one removes it if the parent was killed.
            environment={run_directory.VARIABLE: str(directory)},
            answer=self._answer,
            on_restart=lambda: metrics.count("tandem.process.restarts"),
        )
        metrics.measure(self._read)
        await metrics.start(self._frontend_id)
        log.info("starting %d processes for %s", config.processes, self.address)
        await prefork.start()
        await self._register()

    async def drain(self) -> bool:
        """Drain in the order given above. Returns whether every request ended within drain_timeout_s."""
        assert self._prefork is not None, "drain() before start()"
        assert self._metrics is not None, "drain() before start()"
        assert self._registration is not None, "drain() before start()"
        self._prefork.begin_drain()
        self._metrics.count("tandem.drains")
        # Do not wait for an unreachable registry.
        await self._registration.set_state(WorkerState.DRAINING, 1.0 if self._registration.registered else 0.0)
        try:
            return await self._prefork.drain()
        finally:
            await self._registration.close()

    async def stop(self) -> None:
        """Release everything, also after a failed `start`."""
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
        """Return the reason when a child has died too often, after the other children have drained."""
        assert self._prefork is not None, "wait_finished() before start()"
        sentence = await self._prefork.wait_given_up()
        log.error("%s; draining the other processes", sentence)
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
        """The command line of a child. Its arguments only inform readers of `ps`: settings are sent over the link."""
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
        """The parent's own resources, which a child asks for."""
        return {"process": MessageToDict(held_now(self._started_s))}

    async def _register(self) -> None:
        """Register as one frontend, so that edges and tools can discover it."""
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
        """Values of the gauges."""
        assert self._prefork is not None, "gauges are read after start()"
        states = Counter(SILENT if child.is_silent else child.state.value for child in self._prefork.children)
        return [
            Reading("tandem.processes", states[state], {PROCESS_STATE.name: state}) for state in PROCESS_STATE.values
        ]
