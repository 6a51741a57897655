"""The steps with several workers of a role: which cluster each needs, and what is measured on it.

`catalog` owns their names and the GPUs that each needs.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.domain.checkpoint import read_checkpoint
from tandem.local_cluster.cluster import LocalCluster
from tools.gpu import catalog, chats, fleets, parallel, shapes, takeovers
from tools.gpu.callers import Callers
from tools.gpu.catalog import Step
from tools.gpu.measures import Size
from tools.gpu.results import Results
from tools.gpu.shapes import Fleet, Load, Machine

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Use = Callable[[LocalCluster], Awaitable[None]]
Prepare = Callable[[LocalCluster], None]
WithCluster = Callable[..., Awaitable[None]]
"""`Run.with_cluster`: (name, spec, use, prepare)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Several:
    """What these steps run with."""

    machine: Machine
    model: Path
    load: Load
    size: Size
    callers: Callers
    results: Results
    with_cluster: WithCluster

    @property
    def vocabulary_size(self) -> int:
        """Of the model."""
        return read_checkpoint(self.model).vocabulary_size

    @property
    def rehearses(self) -> bool:
        """Whether this is no GPU machine, so that the work is small."""
        return self.machine.gpus == 0

    async def run(self, name: str) -> None:
        """Run the step of that name, or record why it is not run."""
        gpus = self.machine.places
        step = catalog.named(name, gpus) if name != catalog.PLANNED else self._planned()
        if step is None:
            self.results.leave_out(name, "there is no plan: run a fleet of pairs first, with --add")
            return
        fleet = step.fleet(gpus)
        if fleet is None:
            self.results.leave_out(name, catalog.shortage(step, gpus))
            return
        if not self.machine.has_gpus_for(fleet.engine_gpus):
            self.results.leave_out(name, "ranks of one engine cannot share a GPU")
            return
        named: dict[str, Callable[[str, Fleet], Awaitable[None]]] = {
            "chats": self._chats,
            "kill_decode_of_two": functools.partial(self._kill, "decode"),
            "kill_prefill_of_two": functools.partial(self._kill, "prefill"),
            "rolling_restart": self._roll,
            "tp2": self._tp2,
            "tp2_refused": self._refused,
        }
        await self.results.step(name, functools.partial(named.get(name, self._fleet), name, fleet))
        made_for, state = step.fleets[0], self.results.measured[f"step_{name}"]
        smaller = {} if fleet == made_for else {"smaller_than": made_for.name, "as_made_for_needs_gpus": made_for.gpus}
        self.results.keep(
            f"step_{name}", {**state, "fleet": fleet.name, "gpus": fleet.gpus, **self._sharing(fleet), **smaller}
        )

    def _sharing(self, fleet: Fleet) -> dict[str, Any]:
        gpus = self.machine.gpus
        return {"gpus": gpus, "engines_share": True} if 0 < gpus < fleet.gpus else {}

    def _planned(self) -> Step | None:
        found = fleets.planned(self.results.measured)
        return None if found is None else Step(catalog.PLANNED, (found[1],))

    async def _cluster(
        self,
        name: str,
        fleet: Fleet,
        use: Use,
        *,
        prepare: Prepare | None = None,
        extra: dict[str, Any] | None = None,
        frontends: int | None = None,
    ) -> None:
        load = self.load if frontends is None else replace(self.load, frontends=frontends)
        spec = shapes.cluster_spec(self.machine, self.model, load, fleet, name)

        def place(cluster: LocalCluster) -> None:
            shapes.place(cluster, self.machine, engine_gpus=fleet.engine_gpus, extra=extra)
            if prepare is not None:
                prepare(cluster)

        await self.with_cluster(name, spec, use, place)

    async def _fleet(self, name: str, fleet: Fleet) -> None:
        plan = fleets.planned(self.results.measured) if name == catalog.PLANNED else None
        measured = self.results.measured.get(f"step_{catalog.FLEET}{fleet.name}", {})
        if plan is not None and measured.get("state") == "complete":
            self.results.note(name, {"as": catalog.FLEET + fleet.name, "by": plan[0]})
            return
        place = fleets.Place(
            callers=self.callers,
            results=self.results,
            size=self.size,
            work=fleets.REHEARSAL if self.rehearses else fleets.GPU,
            vocabulary_size=self.vocabulary_size,
        )
        out = self.machine.logs.parent
        measure = functools.partial(fleets.measure, name, place, fleet, self.machine.places, out)
        await self._cluster(name, fleet, measure)

    async def _chats(self, name: str, fleet: Fleet) -> None:
        work = chats.REHEARSAL if self.rehearses else chats.GPU

        async def use(cluster: LocalCluster) -> None:
            await self.results.take("chats", 30, functools.partial(chats.compare, cluster, work))

        pages = {"page_size": chats.PAGE_SIZE_TOKENS}
        # One frontend for each policy.
        await self._cluster(f"{name}_cluster", fleet, use, prepare=chats.prepare, extra=pages, frontends=2)

    async def _kill(self, role: str, name: str, fleet: Fleet) -> None:
        victim = role if fleet.prefill else "aggregated"
        work = self._takeover(role)

        async def use(cluster: LocalCluster) -> None:
            kill = functools.partial(takeovers.kill_one, cluster, victim, work, self.vocabulary_size)
            await self.results.take(name, 60, kill)

        await self._cluster(f"{name}_cluster", fleet, use)

    async def _roll(self, name: str, fleet: Fleet) -> None:
        async def use(cluster: LocalCluster) -> None:
            roll = functools.partial(takeovers.roll, cluster, self._takeover("rolling"), self.vocabulary_size)
            await self.results.take(name, 60, roll)

        await self._cluster(f"{name}_cluster", fleet, use)

    def _takeover(self, kind: str) -> takeovers.Takeover:
        return (takeovers.REHEARSAL if self.rehearses else takeovers.GPU)[kind]

    async def _tp2(self, name: str, fleet: Fleet) -> None:
        """TP 1 first, whose tokens are the references; then TP 2, and the end of one of its ranks."""
        alike = replace(fleet, prefill_tp=1, tp=1)
        spoken: dict[str, parallel.Spoken] = {}

        async def refer(cluster: LocalCluster) -> None:
            spoken["one"] = await parallel.speak(cluster, self.size, self.vocabulary_size)

        async def use(cluster: LocalCluster) -> None:
            if "one" not in spoken:
                raise RuntimeError("there are no tokens of TP 1 to compare with")
            spoken["two"] = await parallel.speak(cluster, self.size, self.vocabulary_size)
            per_token = read_checkpoint(self.model).kv_bytes_per_token(DTYPE_BYTES[self.machine.dtype])
            compared = parallel.compare(spoken["one"], spoken["two"], self.size, per_token)
            self.results.note("tp2_streams", compared)
            references = [streamed.token_ids for streamed in spoken["one"].streams]
            single = functools.partial(parallel.one_by_one, cluster, self.size, self.vocabulary_size, references)
            await self.results.take("tp2_one_by_one", 20, single)
            await self.results.take("tp2_pages", 10, functools.partial(parallel.pages, cluster))
            kill = functools.partial(parallel.kill_rank, cluster, self.vocabulary_size)
            await self.results.take("tp2_killed_rank", 60, kill)

        await self._cluster("tp2_reference", alike, refer)
        await self._cluster("tp2_cluster", fleet, use)

    async def _refused(self, name: str, fleet: Fleet) -> None:
        async def use(cluster: LocalCluster) -> None:
            await self.results.take(name, 10, functools.partial(parallel.refusal, cluster, self.vocabulary_size))

        def refuse(cluster: LocalCluster) -> None:
            # On a CPU they would exchange KV.
            for worker in cluster.workers:
                worker.flags["unequal-tp"] = "false"

        await self._cluster(f"{name}_cluster", fleet, use, prepare=refuse)
