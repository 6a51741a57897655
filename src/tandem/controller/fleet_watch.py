"""A running fleet as the rule observes it: the registry's view, load reports, and the frontends' figures.

Owns the reading. Decides nothing, and trusts only what is current: what is missing is missing in the observation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.types.v1 import worker_pb2
from tandem.client import calls
from tandem.client.figures_watch import FiguresWatch
from tandem.client.load_watch import LoadWatch
from tandem.client.role_calls import roles_of
from tandem.clock import Clock, monotonic
from tandem.controller.figures import LoadSampler, Observation, SeenWorker, Traffic
from tandem.domain.worker import EngineLoad, Start, Worker, WorkerRole
from tandem.errors import StartError, TandemError
from tandem.rpc.channels import Channels
from tandem.rpc.convert import frontend_from_proto, worker_from_proto
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)


class FleetWatch:
    """The fleet of one model."""

    def __init__(self, model: str | None, tls: Tls | None, clock: Clock = monotonic) -> None:
        """`model`: None: the only one."""
        self._model = model
        self.model = model or ""
        """The model that was observed last; empty: none is known yet, or one has to be named."""
        self._tls = tls
        self._clock = clock
        self._channels = Channels(tls)
        self._sampler = LoadSampler()
        self._loads = LoadWatch(self._channels, on_change=self._note)
        self._figures = FiguresWatch(tls, clock)
        self._roles: dict[Start, frozenset[WorkerRole]] = {}

    async def close(self) -> None:
        """End all streams."""
        await self._loads.close()
        await self._figures.close()
        await self._channels.close()

    async def observe(self, registry: str) -> Observation:
        """The fleet now, as a registry lists it.

        Raises:
            StartError: the workers serve several models, and none was named.
            TandemError: the registry does not respond.
        """
        listed = await calls.list_members(registry, tls=self._tls)
        every = [worker_from_proto(one.worker) for one in listed.workers]
        self.model = ""
        model = self.model = self.model_of(every)
        workers = [one for one in every if one.capabilities.model == model]
        serving = [one.frontend for one in listed.frontends if one.frontend.state == worker_pb2.WORKER_STATE_SERVING]
        self._loads.follow(workers)
        self._figures.follow(map(frontend_from_proto, serving))
        self._sampler.keep({one.start for one in workers})
        await self._learn_roles(workers)
        return Observation(
            at_s=self._clock(),
            is_live=listed.source != pb.VIEW_SOURCE_LAST_KNOWN,
            workers=tuple(map(self._seen, workers)),
            traffic=self._traffic(),
        )

    def model_of(self, workers: Sequence[Worker]) -> str:
        """The model to control.

        Raises:
            StartError: there are several to choose from.
        """
        names = sorted({one.capabilities.model for one in workers})
        if self._model is None and len(names) > 1:
            raise StartError(f"model is required: the workers serve {', '.join(names)}")
        return self._model or (names[0] if names else "")

    def _seen(self, worker: Worker) -> SeenWorker:
        start = worker.start
        return SeenWorker(
            worker=worker,
            load=self._loads.of(start),
            counts=self._sampler.of(start),
            roles=self._roles.get(start, frozenset()),
        )

    def _note(self, start: Start, load: EngineLoad | None) -> None:
        report = self._loads.reports(start)[1]
        if load is not None:
            emitted = report.completion_tokens if report is not None and report.HasField("completion_tokens") else None
            self._sampler.note(start, load, emitted, self._clock())

    def _traffic(self) -> Traffic | None:
        figures = self._figures.all()
        if figures is None:
            return None
        return Traffic(
            open_requests=sum(one.open_requests for one in figures),
            waiting_requests=sum(one.waiting_requests for one in figures),
            ended_requests=sum(one.finished_requests + one.failed_requests + one.cancelled_requests for one in figures),
        )

    async def _learn_roles(self, workers: Sequence[Worker]) -> None:
        """Ask each new start for the roles that it may take; one that does not respond is asked again."""
        self._roles = {one.start: self._roles[one.start] for one in workers if one.start in self._roles}
        new = [one for one in workers if one.start not in self._roles]

        async def learn(worker: Worker) -> None:
            try:
                self._roles[worker.start] = await roles_of(self._channels, worker.address)
            except TandemError as problem:
                log.debug("the roles of worker %s are not known yet: %s", worker.worker_id, problem)

        await asyncio.gather(*map(learn, new))
