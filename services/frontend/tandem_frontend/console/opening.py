"""Opens the console of a frontend: its parts, in order. Imported only where a console is configured.

Owns what the console reads of the fleet; nothing of the frontend depends on the console.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tandem.clock import epoch_now
from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend
from tandem.domain.network_address import join_address
from tandem.domain.worker import Start, Worker
from tandem.service.background import BackgroundTasks
from tandem_frontend.config import FrontendConfig
from tandem_frontend.console.access import ConsoleKeys
from tandem_frontend.console.feed import FleetFeed, Report
from tandem_frontend.console.frontends import ConsoleFrontends
from tandem_frontend.console.server import Console
from tandem_frontend.fleet import Fleet

log = logging.getLogger(__name__)


class _FleetView:
    """The fleet as `feed.FleetSource`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def workers(self) -> tuple[Worker, ...]:
        return self._fleet.watch.workers()

    def is_live(self) -> bool:
        return self._fleet.watch.state.is_live

    def reports(self, start: Start) -> tuple[Report, Report]:
        return self._fleet.loads.reports(start)

    def unhealthy(self) -> frozenset[Start]:
        return self._fleet.unhealthy()

    def ejected(self) -> frozenset[Start]:
        return self._fleet.ejected()


@asynccontextmanager
async def open_console(config: FrontendConfig, fleet: Fleet, frontend_id: str, address: str) -> AsyncIterator[int]:
    """Serve the console while the context is open; yields its port.

    Args:
        config: of a frontend with console_port and console_keys.
        fleet: the workers, as this frontend sees them.
        frontend_id: of this frontend.
        address: its host:port for gRPC.

    Raises:
        ConfigError: the file of keys cannot be used.
        StartError: the port is in use, or a TLS file is unusable.
    """
    assert config.console_port is not None
    assert config.console_keys is not None
    keys = ConsoleKeys(Path(config.console_keys))
    own = Frontend(frontend_id=frontend_id, epoch=epoch_now(), address=address, model=config.served_name or "")
    async with AsyncExitStack() as stack:
        watch = FrontendWatch(config.registry, tls=config.tls)
        stack.push_async_callback(watch.close)
        await watch.start()
        frontends = ConsoleFrontends(watch, own, config.tls)
        head = {"frontend": frontend_id, "model": own.model}
        feed = FleetFeed(_FleetView(fleet), frontends, head)
        tasks = await stack.enter_async_context(BackgroundTasks())
        tasks.start(feed.run(), "console")
        console = Console(keys, feed, frontends, config.tls)
        port = await stack.enter_async_context(console.listening(config.host, config.console_port))
        scheme = "http" if config.tls is None else "https"
        log.info("console on %s://%s", scheme, join_address(config.reachable_host, port))
        yield port
