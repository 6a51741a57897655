"""Composition root of the controller: observes, decides with `rule`, and changes roles at a registry while it leads.

Serves health only. Drain: end the loop, resign. A role change that is under way goes on at its worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing

from tandem.client.role_calls import Leading, change_role
from tandem.controller.fleet_watch import FleetWatch
from tandem.controller.leadership import Leadership
from tandem.controller.registries import Registries
from tandem.controller.rule import Decision, RoleRule
from tandem.controller.settings import ControllerConfig
from tandem.domain.decision import Why
from tandem.domain.network_address import join_address
from tandem.errors import RoleChangeRefused, StaleEpoch, TandemError
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import Metrics, Reading, open_metrics
from tandem.rpc.server import RpcServer

log = logging.getLogger(__name__)

ELECTION_CHARS_MAX = 128
HASH_CHARS = 16
STOP_GRACE_S = 0.2


class ControllerApp:
    """A running controller, as `tandem.service.process` runs it. `open` makes one."""

    def __init__(self, config: ControllerConfig, metrics: Metrics, server: RpcServer) -> None:
        self._config = config
        self._metrics = metrics
        self._server = server
        self._registries = Registries(config.registry)
        self._fleet = FleetWatch(config.model, config.tls)
        self._rule = RoleRule(config.rule())
        self._leadership = Leadership(f"controller-{uuid.uuid4().hex}", config.tls)
        self._tasks: list[asyncio.Task[None]] = []
        self._last = Decision(why=Why.NO_FIGURES, words="")
        """The last decision that was logged."""
        self._needs = {"prefill": 0.0, "decode": 0.0}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, config: ControllerConfig) -> AsyncIterator[ControllerApp]:
        """Start a controller, and stop it on exit.

        Raises:
            StartError: a port is in use, or a TLS file is unusable.
        """
        async with contextlib.AsyncExitStack() as stack:
            metrics = open_metrics(config, Emitter.CONTROLLER, "tandem-controller", config.tls)
            stack.push_async_callback(metrics.stop)
            server = RpcServer((), tls=config.tls)
            stack.push_async_callback(server.stop, STOP_GRACE_S)
            server.bind(config.host, config.port)
            app = cls(config, metrics, server)
            metrics.measure(app._gauges)
            await metrics.start(app.address)
            stack.push_async_callback(app._stop)
            await server.serve()
            await server.set_serving(True)
            app._tasks = [
                asyncio.create_task(app._lead(), name="leadership"),
                asyncio.create_task(app._control(), name="control"),
            ]
            yield app

    @property
    def address(self) -> str:
        """host:port it serves health on."""
        return join_address(self._config.reachable_host, self._server.port)

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint; 0: there is none."""
        return self._metrics.port

    async def drain(self) -> bool:
        """End the loop, and let another controller lead."""
        self._metrics.count("tandem.drains")
        await self._server.set_serving(False)
        await self._end()
        if self._registries.last:
            await self._leadership.resign(self._registries.last)
        return True

    async def wait_finished(self) -> str | None:
        """Return why the loop has ended; never returns otherwise."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = done.pop()
        return f"task {ended.get_name()} ended: {ended.exception()!r}"

    async def _stop(self) -> None:
        await self._end()
        await self._fleet.close()

    async def _end(self) -> None:
        tasks = [task for task in self._tasks if not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _gauges(self) -> Iterable[Reading]:
        yielded = [Reading("tandem.controller.leader", float(self._leadership.leading is not None))]
        return yielded + [
            Reading("tandem.controller.need", need, {"tandem.role": role}) for role, need in self._needs.items()
        ]

    async def _lead(self) -> None:
        """Ask to lead, also while a role change is under way."""
        while True:
            registry = await self._registries.live()
            # The same election with and without the setting: by the name of the model that the workers have.
            if registry is not None and self._fleet.model:
                await self._leadership.ask(registry, election_of(self._fleet.model))
            await asyncio.sleep(self._config.interval_s)

    async def _control(self) -> None:
        while True:
            await asyncio.sleep(self._config.interval_s)
            await self._step()

    async def _step(self) -> None:
        """Observe, decide, and act where this controller leads."""
        registry = self._registries.last
        if registry is None:
            return
        try:
            observation = await self._fleet.observe(registry)
        except TandemError as problem:
            self._registries.failed(registry)
            self._say(Decision(why=Why.STALE_VIEW, words=f"no role is changed: {problem}"))
            return
        if not observation.is_live:
            # Another registry may still reach the store.
            self._registries.failed(registry)
        decision = self._rule.decide(observation)
        if decision.needs is not None:
            self._needs = {"prefill": decision.needs.prefill, "decode": decision.needs.decode}
        # Others observe too, so that they know the load when they lead.
        leading = self._leadership.leading
        if leading is None or leading.election != election_of(self._fleet.model):
            return
        if decision.start is not None and self._config.dry_run:
            decision = Decision(why=Why.DRY_RUN, words=f"dry run, nothing is changed: {decision.words}")
        self._metrics.count("tandem.controller.decisions", 1, {"tandem.reason": decision.why.value})
        self._say(decision)
        if decision.start is not None:
            await self._change(registry, decision, leading)

    def _say(self, decision: Decision) -> None:
        """Log a decision: each change, and each new reason for none."""
        if decision.why is Why.CHANGE or decision.why is not self._last.why:
            log.info("decision %s: %s", decision.why.value, decision.words)
        self._last = decision

    async def _change(self, registry: str, decision: Decision, leading: Leading) -> None:
        assert decision.start is not None, "only a change"
        assert decision.role is not None, "only a change"
        worker_id, epoch = decision.start
        steps = change_role(
            registry, worker_id, decision.role, epoch=epoch, leading=leading, tls=self._config.tls,
            drain_timeout_s=self._config.role_drain_timeout_s,
        )  # fmt: skip
        outcome = "done"
        try:
            async with aclosing(steps) as progress:
                async for _ in progress:
                    pass
            log.info("worker %s has role %s", worker_id, decision.role.value)
        except TandemError as problem:
            outcome = "refused" if isinstance(problem, RoleChangeRefused | StaleEpoch) else "failed"
            log.warning("worker %s did not take role %s: %s", worker_id, decision.role.value, problem)
            self._rule.refused(decision.start, asyncio.get_running_loop().time())
        attributes = {"tandem.role": decision.role.value, "tandem.outcome": outcome}
        self._metrics.count("tandem.controller.changes", 1, attributes)


def election_of(model: str) -> str:
    """The election of the controllers of one model: names that differ have different ones, whatever they contain."""
    named = re.sub("[^A-Za-z0-9._-]", "-", f"roles-of-{model}")[: ELECTION_CHARS_MAX - HASH_CHARS - 1]
    return f"{named}-{hashlib.sha256(model.encode()).hexdigest()[:HASH_CHARS]}"
