"""One whole run, most important measurements first: `python -m tools.gpu run`.

Owns the order and the deadline. A measurement that fails or has no time left is recorded as such, and the run
continues with the next one.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.domain.checkpoint import read_checkpoint
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tools.gpu import catalog, copies, decode_crowd, decode_heavy, endings, measures, observed, overhead, shapes
from tools.gpu.callers import Callers
from tools.gpu.measures import Size
from tools.gpu.results import Results
from tools.gpu.several import DTYPE_BYTES, Prepare, Several
from tools.gpu.shapes import Load, Machine
from tools.gpu.summaries import Streamed

PARITY_CONCURRENT = 8
STEPS = ("parity", "pair", "aggregated", "two_aggregated", "copies", "overhead", "observed", "decode_heavy")
"""What is run unless steps are named; `decode_heavy` is `decode_heavy_aggregated` and `decode_heavy_pair`. `kills` is
the end of `overhead` by itself, with decode killed twice. Those of `catalog` are run when they are named."""
NAMED = ("kills", "decode_heavy_aggregated", "decode_heavy_pair", "decode_heavy_crowd", catalog.GROUP)
"""Steps that are run only when they are named, beside those of `catalog`."""
TAIL_LINES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run, on which models, with how much work."""

    machine: Machine
    size: Size
    demo: Path
    model: Path
    steps: tuple[str, ...] = STEPS
    load: Load
    demo_load: Load
    callers: int = 2


class Run:
    """The state of one run."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan = plan
        self.results = results
        self.callers = Callers(plan.callers)

    async def all(self) -> None:
        """Every step of the plan."""
        steps: dict[str, Callable[[], Awaitable[None]]] = {
            "parity": self._parity,
            "pair": functools.partial(self._shape, "pair", shapes.pair),
            "aggregated": functools.partial(self._shape, "aggregated", shapes.aggregated),
            "two_aggregated": functools.partial(self._shape, "two_aggregated", shapes.two_aggregated),
            "copies": self._copies,
            "overhead": self._overhead,
            "observed": self._observed,
            "kills": self._kills,
            "decode_heavy": self._decode_heavy,
            "decode_heavy_aggregated": functools.partial(self._heavy_shape, "aggregated"),
            "decode_heavy_pair": functools.partial(self._heavy_shape, "pair"),
            "decode_heavy_crowd": functools.partial(self._heavy_shape, "crowd"),
        }
        several = self._several()
        try:
            await self.callers.warm()
            for step in expanded(self.plan.steps, self.plan.machine.places):
                if step in steps:
                    await self.results.step(step, steps[step])
                else:
                    await several.run(step)
        finally:
            self.callers.close()
        self.results.keep("left_s", round(self.results.left_s))

    def _several(self) -> Several:
        plan = self.plan
        return Several(
            machine=plan.machine,
            model=plan.model,
            load=plan.load,
            size=plan.size,
            callers=self.callers,
            results=self.results,
            with_cluster=self.with_cluster,
        )

    async def _parity(self) -> None:
        """The demo model: streams of the pair beside those of an aggregated worker, one at a time and eight at once."""
        plan = self.plan
        checkpoint = read_checkpoint(plan.demo)
        per_token = checkpoint.kv_bytes_per_token(DTYPE_BYTES[plan.machine.dtype])
        heard: dict[tuple[str, int], list[Streamed]] = {}

        async def listen(shape: str, cluster: LocalCluster) -> None:
            for concurrent in (1, PARITY_CONCURRENT):
                streams = await measures.parity_streams(cluster, plan.size, checkpoint.vocabulary_size, concurrent)
                heard[shape, concurrent] = streams

        for shape, make in (("aggregated", shapes.aggregated), ("pair", shapes.pair)):
            spec = make(plan.machine, plan.demo, plan.demo_load, f"demo-{shape}")
            await self.with_cluster(f"demo_{shape}", spec, functools.partial(listen, shape))
        for concurrent in (1, PARITY_CONCURRENT):
            pair, alone = heard.get(("pair", concurrent)), heard.get(("aggregated", 1))
            if pair and alone:
                self.results.note(f"parity_{concurrent}", measures.parity(plan.size, per_token, pair, alone))
        # What batches alone change, to separate it from what the hand-over changes.
        batched, alone = heard.get(("aggregated", PARITY_CONCURRENT)), heard.get(("aggregated", 1))
        if batched and alone:
            self.results.note("aggregated_batched", measures.parity(plan.size, per_token, batched, alone))

    async def _shape(self, shape: str, make: Callable[..., ClusterSpec]) -> None:
        """The large model on one shape of cluster: throughput, long prompts, and for the pair its endings."""
        plan = self.plan
        spec = make(plan.machine, plan.model, plan.load, f"model-{shape}")
        await self.with_cluster(shape, spec, functools.partial(self._on_model, shape))

    async def _on_model(self, shape: str, cluster: LocalCluster) -> None:
        plan, take = self.plan, self.results.take
        vocabulary = read_checkpoint(plan.model).vocabulary_size
        warm = functools.partial(measures.throughput, cluster, self.callers, plan.size, vocabulary)
        await take(f"{shape}_warm", 5, functools.partial(warm, min(8, plan.size.levels[-1])))
        for level in plan.size.levels:
            await take(f"{shape}_{level}", 10, functools.partial(warm, level))
        busy = functools.partial(measures.interference, cluster, self.callers, plan.size, vocabulary)
        await take(f"{shape}_interference", 15, busy)
        if shape == "pair":
            cancel = functools.partial(endings.cancel, cluster, plan.size, vocabulary)
            decoding = {"at_token": 8, "prompt_tokens": plan.size.prompt_tokens}
            prefilling = {"at_token": 0, "prompt_tokens": plan.size.long_prompt_tokens}
            await take("cancel_decoding", 10, functools.partial(cancel, **decoding))
            await take("cancel_prefilling", 10, functools.partial(cancel, **prefilling))

    async def _copies(self) -> None:
        machine = self.plan.machine
        on_cpu = machine.device == "cpu"
        pairs = [("cpu", "cpu")] if on_cpu else [("cuda:0", f"cuda:{machine.gpu(1)}")]
        sizes = copies.SIZES_BYTES[:2] if on_cpu else copies.SIZES_BYTES
        for places in pairs:
            name = f"copies_{places[0]}_{places[1]}".replace(":", "")
            await self.results.take(name, 20, functools.partial(asyncio.to_thread, copies.measure, places, sizes))

    async def _overhead(self) -> None:
        """Beside bare engines; then, on the same cluster and without them, engines are killed."""
        plan = self.plan
        load = overhead.shared(plan.load)
        vocabulary = read_checkpoint(plan.model).vocabulary_size

        async def use(cluster: LocalCluster) -> None:
            rounds = overhead.ROUNDS if plan.machine.gpus else overhead.ROUNDS_REHEARSED
            compare = functools.partial(overhead.compare, cluster, pair, plan.size.new_tokens, vocabulary, rounds)
            await self.results.take("overhead", 20, compare)
            await pair.stop()
            kill = functools.partial(endings.kill, cluster, plan.size, vocabulary)
            await self.results.take("kill_decode", 40, functools.partial(kill, "decode", plan.size.prompt_tokens))
            await self.results.take(
                "kill_prefill", 40, functools.partial(kill, "prefill", plan.size.long_prompt_tokens)
            )

        pair = await overhead.BarePair.start(plan.machine, plan.model, load)
        try:
            await self.with_cluster("beside_bare", shapes.pair(plan.machine, plan.model, load, "overhead"), use)
        finally:
            await pair.stop()

    async def _observed(self) -> None:
        """A pair with all observability on: whether its data is right, and what it costs the streams."""
        plan, take = self.plan, self.results.take
        vocabulary = read_checkpoint(plan.model).vocabulary_size
        spec = observed.with_everything(shapes.pair(plan.machine, plan.model, plan.load, "observed"))

        async def use(cluster: LocalCluster) -> None:
            given = (cluster, plan.size, vocabulary)
            for name, of in (("traces", observed.traces), ("pages", observed.pages), ("metrics", observed.metrics)):
                await take(f"observed_{name}", 10, functools.partial(of, *given))
            out = plan.machine.logs.parent / "profile"
            await take("observed_profile", 20, functools.partial(observed.profile, *given, out))
            busy = functools.partial(measures.interference, cluster, self.callers, plan.size, vocabulary)
            for number in (1, 2):
                await take(f"observed_interference_{number}", 15, busy)

        await self.with_cluster("observed", spec, use)

    async def _kills(self) -> None:
        """Kills of either engine of a pair; decode twice, because its successor needs the memory of the first."""
        plan = self.plan

        async def use(cluster: LocalCluster) -> None:
            kill = functools.partial(endings.kill, cluster, plan.size, read_checkpoint(plan.model).vocabulary_size)
            for name in ("kill_decode", "kill_decode_again"):
                await self.results.take(name, 40, functools.partial(kill, "decode", plan.size.prompt_tokens))
            await self.results.take(
                "kill_prefill", 40, functools.partial(kill, "prefill", plan.size.long_prompt_tokens)
            )

        await self.with_cluster("kills", shapes.pair(plan.machine, plan.model, plan.load, "kills"), use)

    async def _decode_heavy(self) -> None:
        """Both shapes, one after the other: a failure of one does not keep the other."""
        for shape in ("aggregated", "pair"):
            step = functools.partial(self._heavy_shape, shape)
            await self.results.take(f"step_decode_heavy_{shape}", 0, step, proves=False)

    async def _heavy_shape(self, shape: str) -> None:
        """Many streams at once, beside bare engines."""
        plan = self.plan
        name = f"decode_heavy_{shape}"
        make, compare = {
            "aggregated": (shapes.aggregated, decode_heavy.aggregated),
            "pair": (shapes.pair, decode_heavy.pair),
            "crowd": (shapes.aggregated, decode_crowd.compare),
        }[shape]

        async def with_cluster(load: Load, first_gpu: int, use: Callable[[LocalCluster], Awaitable[None]]) -> None:
            place = functools.partial(shapes.place, machine=plan.machine, first=first_gpu)
            await self.with_cluster(name, make(plan.machine, plan.model, load, name), use, place)

        place = decode_heavy.Place(
            machine=plan.machine,
            model=plan.model,
            vocabulary_size=read_checkpoint(plan.model).vocabulary_size,
            frontends=plan.load.frontends,
            heavy=decode_heavy.GPU if plan.machine.gpus else decode_heavy.REHEARSAL,
            callers=self.callers,
            results=self.results,
        )
        await compare(name, place, with_cluster)

    async def with_cluster(
        self,
        name: str,
        spec: ClusterSpec,
        use: Callable[[LocalCluster], Awaitable[None]],
        prepare: Prepare | None = None,
    ) -> None:
        """A cluster for one step, prepared before its start; the ends of its logs are kept when something fails."""
        prepare = prepare or functools.partial(shapes.place, machine=self.plan.machine)

        async def step() -> dict[str, Any]:
            begin_left_s = self.results.left_s
            cluster = LocalCluster(spec)
            prepare(cluster)
            async with cluster:
                started_s = round(begin_left_s - self.results.left_s, 1)
                self.results.report(f"{name} serves after {started_s} s")
                await use(cluster)
            return {"started_s": started_s}

        if not await self.results.take(name, 20, step, proves=False):
            self.results.keep(f"{name}_logs", tails(spec.log_directory))


def check_steps(steps: Sequence[str], gpus: int) -> None:
    """Check the names before anything starts.

    Raises:
        ValueError: names the step that does not exist.
    """
    for name in steps:
        if name not in (*STEPS, *NAMED) and not catalog.knows(name, gpus):
            raise ValueError(f"--steps: there is no step {name}")


def expanded(steps: Sequence[str], gpus: int) -> list[str]:
    """The steps by their own names."""
    return [name for step in steps for name in (catalog.group(gpus) if step == catalog.GROUP else (step,))]


def tails(logs: Path | None) -> dict[str, list[str]]:
    """The last lines of each process."""
    files = sorted(logs.glob("*.log")) if logs is not None and logs.is_dir() else []
    return {file.stem: file.read_text(errors="replace").splitlines()[-TAIL_LINES:] for file in files}


def save_logs(logs: Path, out: Path) -> None:
    """All logs as one archive."""
    logs.mkdir(parents=True, exist_ok=True)
    shutil.make_archive(str(out / "logs"), "gztar", logs)
