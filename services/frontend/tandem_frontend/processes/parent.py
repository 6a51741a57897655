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
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

import tandem
from tandem.clock import epoch_now
from tandem.discovery import Registration
from tandem.discovery.advertised import log_doubts
from tandem.domain.frontend import Frontend, default_frontend_id
from tandem.domain.network_address import join_address
from tandem.domain.worker import WorkerState
from tandem.errors import StartError
from tandem.observability.metric_attributes import PROCESS_STATE
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import Measure, Metrics, Reading, Together, open_metrics
from tandem.rpc.http2.listener import Listener
from tandem.rpc.listening import check_listenable
from tandem.rpc.process_servicer import held_now
from tandem.rpc.service_host import warn_of_plaintext
from tandem.service import run_directory
from tandem.service.prefork.parent import Prefork
from tandem_frontend.config import PROGRAM, FrontendConfig
from tandem_frontend.processes.identity import ProcessIdentity, metrics_path

log = logging.getLogger(__name__)

DIRECTORY_PREFIX = "frontend-"
OWN_LABEL = "parent"
SILENT = "silent"


class FrontendParent:
    """The serving parent, as `tandem.service.process` runs it. `open` makes one."""

    def __init__(self, address: str, metrics: Metrics, prefork: Prefork, registration: Registration) -> None:
        self.address = address
        """host:port of the frontend."""
        self._metrics = metrics
        self._prefork = prefork
        self._registration = registration

    @classmethod
    @asynccontextmanager
    async def open(cls, config: FrontendConfig) -> AsyncIterator[FrontendParent]:
        """Start the children and stop them on exit. Enters when one serves; waits for a registry without a timeout.

        Raises:
            StartError: the port is in use, or a child could not start.
        """
        started_s = time.time()
        async with AsyncExitStack() as stack:
            listener = _listen(config)
            stack.callback(listener.close)
            address = join_address(config.reachable_host, listener.port)
            frontend_id = config.frontend_id or default_frontend_id(address)
            directory = run_directory.make_inside(DIRECTORY_PREFIX)
            stack.push_async_callback(asyncio.to_thread, shutil.rmtree, directory, ignore_errors=True)
            sockets = {str(number): metrics_path(directory, number) for number in range(config.processes)}
            together = Together(others=sockets, own_label=OWN_LABEL)
            metrics = open_metrics(config, Emitter.PARENT, PROGRAM, config.tls, together=together)
            stack.push_async_callback(metrics.stop)
            prefork = Prefork(
                # Its arguments only inform readers of `ps`: settings are sent over the link.
                [sys.executable, "-m", "tandem_frontend", *sys.argv[1:]],
                [_begin(config, frontend_id, address, number, directory) for number in range(config.processes)],
                listener,
                drain_s=config.drain_settle_s + config.drain_timeout_s,
                # Files that must not outlive the children: the last one removes the directory if the parent was killed.
                environment={run_directory.VARIABLE: str(directory)},
                answer=lambda question: {"process": MessageToDict(held_now(started_s))},
                on_restart=lambda: metrics.count("tandem.process.restarts"),
            )
            metrics.measure(_gauges(prefork))
            await metrics.start(frontend_id)
            log.info("starting %d processes for %s", config.processes, address)
            stack.push_async_callback(prefork.stop)
            await prefork.start()
            registration = _registration(config, frontend_id, address)
            stack.push_async_callback(registration.close)
            await log_doubts(address, config.registry)
            await registration.start()
            yield cls(address, metrics, prefork, registration)

    @property
    def metrics_port(self) -> int:
        """Port of the Prometheus endpoint for all processes; 0: none."""
        return self._metrics.port

    async def drain(self) -> bool:
        """Drain in the order given above. Returns whether every request ended within drain_timeout_s."""
        self._prefork.begin_drain()
        self._metrics.count("tandem.drains")
        # Do not wait for an unreachable registry.
        await self._registration.set_state(WorkerState.DRAINING, 1.0 if self._registration.registered else 0.0)
        try:
            return await self._prefork.drain()
        finally:
            await self._registration.close()

    async def wait_finished(self) -> str | None:
        """Return the reason when a child has died too often, after the other children have drained."""
        sentence = await self._prefork.wait_given_up()
        log.error("%s; draining the other processes", sentence)
        await self.drain()
        return sentence


def _listen(config: FrontendConfig) -> Listener:
    host, port = config.host, config.port
    check_listenable(host, port)
    try:
        listener = Listener(host, port)
    except OSError:
        raise StartError(f"cannot listen on {join_address(host, port)}: the port is in use or not allowed") from None
    if config.tls is None:
        warn_of_plaintext(host)
    return listener


def _begin(config: FrontendConfig, frontend_id: str, address: str, number: int, directory: Path) -> Mapping[str, Any]:
    """The first message to a child."""
    identity = ProcessIdentity(
        number=number,
        count=config.processes,
        frontend_id=frontend_id,
        address=address,
        directory=str(directory),
    )
    return {"identity": identity.as_dict(), "settings": settings_of(config, number).model_dump(mode="json")}


def share(total: int, number: int, count: int) -> int:
    """The share of process `number` of `count`: as even as possible; the first ones get the remainder."""
    return total // count + (number < total % count)


def settings_of(config: FrontendConfig, number: int) -> FrontendConfig:
    """The settings of one child: its share of the limits, without what only the parent does.

    The open-requests limit and the rate of a tenant are divided. The workers' capacity is not, because `capacity`
    treats each process as a frontend of its own. The first process serves the console.
    """
    update: dict[str, Any] = {"processes": 1, "announce_file": None}
    if number > 0:
        update |= {"console_port": None, "console_keys": None}
    update["open_requests_max"] = share(config.open_requests_max, number, config.processes)
    if config.tenant_requests_per_second is not None:
        update["tenant_requests_per_second"] = config.tenant_requests_per_second / config.processes
    if config.tenant_requests_burst is not None:
        update["tenant_requests_burst"] = -(-config.tenant_requests_burst // config.processes)
    return config.model_copy(update=update)


def _registration(config: FrontendConfig, frontend_id: str, address: str) -> Registration:
    """All processes as one frontend, so that edges and tools can discover it."""
    frontend = Frontend(
        frontend_id=frontend_id,
        epoch=epoch_now(),
        address=address,
        model=config.registered_name,
        release=tandem.__version__,
    )
    return Registration(config.registry, frontend, tls=config.tls, may_be_fenced=False)


def _gauges(prefork: Prefork) -> Measure:
    async def read() -> list[Reading]:
        states = Counter(SILENT if child.is_silent else child.state.value for child in prefork.children)
        return [
            Reading("tandem.processes", states[state], {PROCESS_STATE.name: state}) for state in PROCESS_STATE.values
        ]

    return read
