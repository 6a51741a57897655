"""Accounted engines: a queue as theory has it, the same times as the simulated engine, memory, and the shared link."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.replay.decode_batch import Run
from tandem_frontend.replay.engine import AccountedEngine
from tandem_frontend.replay.fleet_file import parse_fleet
from tandem_frontend.replay.job import Job

from tandem.domain.generation import EngineRequest, Sampling, Stopping
from tandem.domain.kv_blocks import block_hashes
from tandem.domain.worker import Worker, WorkerRole
from tandem.engine.pulling import generate
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.engine.simulated.network import MemoryNetwork
from tandem.engine.simulated.options import parse_options
from tandem.testing.fake_model import write_fake_model
from tandem.testing.virtual_time import LoopClock, run_virtually
from tests.unit.support.examples import examples

FLEET: dict[str, Any] = {"prefill": {"count": 1}, "decode": {"count": 1}, "aggregated": {"count": 1}}


def worker_of(role: WorkerRole, **changes: Any) -> Worker:
    workers = parse_fleet({**FLEET, **changes}).workers()
    return next(worker for worker in workers if worker.role is role)


def pair(
    prefill: dict[str, Any], decode: dict[str, Any], block_tokens: int = 512, **options: Any
) -> tuple[AccountedEngine, AccountedEngine]:
    changes = {"prefill": {"count": 1, **prefill}, "decode": {"count": 1, **decode}, "block_tokens": block_tokens}
    parsed = parse_options(options)
    made = (AccountedEngine(worker_of(role, **changes), parsed, 1) for role in (WorkerRole.PREFILL, WorkerRole.DECODE))
    return next(made), next(made)


def test_waits_are_those_of_an_m_d_1_queue() -> None:
    """Poisson arrivals, one server, constant service: the mean wait is rho / (2 (1 - rho)) services."""
    utilisation, count = 0.7, 20_000

    async def mean_wait_s() -> float:
        # One prompt a second, one prompt a step.
        prefill, decode = pair(
            {}, {}, prefill_tokens_per_s=2048, chunked_prefill_tokens=2048, transfer_bytes_per_s=1e18
        )
        loop, rng, waits, ended = asyncio.get_running_loop(), random.Random(5), list[float](), asyncio.Event()

        def arrive() -> None:
            arrival_s = loop.time()

            def prefilled(job: Job) -> None:
                waits.append(job.prefill_start_s - arrival_s)
                if len(waits) == count:
                    ended.set()

            prefill.begin(Job(2048, 1, (), prefilled), decode)

        at_s = 0.0
        for _ in range(count):
            at_s += rng.expovariate(utilisation)
            loop.call_at(at_s, arrive)
        await ended.wait()
        assert prefill.figures.busy_s == pytest.approx(count)
        return sum(waits) / count

    expected_s = utilisation / (2 * (1 - utilisation))
    assert run_virtually(mean_wait_s()) == pytest.approx(expected_s, rel=0.05)


PAGE = 16
Plan = list[tuple[float, list[int], int]]
"""Arrival, prompt and answer length of each request."""


def shared_load(seed: int, count: int) -> Plan:
    """Prompts that share prefixes; never two arrivals at once."""
    rng = random.Random(seed)
    system = [rng.randrange(20, 90) for _ in range(4 * PAGE)]
    plan: Plan = []
    for number in range(count):
        own = [rng.randrange(20, 90) for _ in range(rng.randrange(1, 12) * PAGE)]
        prompt = (plan[rng.randrange(number)][1] if number and rng.random() < 0.4 else system) + own
        plan.append((number * 0.0371 * rng.random() * 4, prompt, rng.randrange(1, 30)))
    return sorted(plan)


OPTIONS: dict[str, Any] = {
    "prefill_step_s": 0.003,
    "prefill_tokens_per_s": 20_000,
    "prefill_pair_s": 1e-7,
    "decode_step_s": 0.004,
    "decode_request_s": 0.001,
    "decode_context_token_s": 1e-6,
    "chunked_prefill_tokens": 128,
}


def simulated_engine(model_path: Path) -> SimulatedEngine:
    """The simulated engine with the accounted one's options."""
    settings = EngineSettings(
        role=WorkerRole.AGGREGATED,
        model_path=model_path,
        model_name="m",
        kv_capacity_tokens=200_000,
        running_requests_max=64,
        seed=1,
        extra=OPTIONS,
    )
    return SimulatedEngine(settings, LoopClock(), MemoryNetwork())


async def simulated_ends(model_path: Path, plan: Plan) -> list[tuple[float, float, int]]:
    """First token, last token and cached tokens of each request, of the simulated engine."""
    engine = simulated_engine(model_path)
    await engine.start()
    loop = asyncio.get_running_loop()
    begin_s = loop.time()

    async def one(number: int, arrival_s: float, prompt: Sequence[int], answer: int) -> tuple[float, float, int]:
        await asyncio.sleep(arrival_s)
        stopping = Stopping(max_tokens=answer, ignore_eos=True)
        times, cached = [], 0
        request = EngineRequest(
            request_id=f"r{number}", token_ids=tuple(prompt), sampling=Sampling(), stopping=stopping
        )
        async for batch in generate(engine, request):
            times += [loop.time() - begin_s] * len(batch.token_ids)
            cached = batch.finish.cached_tokens if batch.finish is not None else cached
        assert len(times) == answer
        return times[0], times[-1], cached

    ends = await asyncio.gather(*(one(number, *request) for number, request in enumerate(plan)))
    await engine.stop()
    return ends


def accounted_engine() -> AccountedEngine:
    fleet = {"block_tokens": PAGE, "aggregated": {"count": 1, "cache_blocks": 12_500, "running_requests_max": 64}}
    return AccountedEngine(worker_of(WorkerRole.AGGREGATED, **fleet), parse_options(OPTIONS), 1)


async def accounted_ends(plan: Plan) -> list[tuple[float, float, int]]:
    """The same of an accounted engine."""
    engine = accounted_engine()
    loop = asyncio.get_running_loop()
    begin_s = loop.time()

    async def one(arrival_s: float, prompt: list[int], answer: int) -> tuple[float, float, int]:
        await asyncio.sleep(arrival_s)
        ended = loop.create_future()
        job = Job(len(prompt), answer, tuple(block_hashes(prompt, PAGE)), ended=lambda job: ended.set_result(None))
        engine.begin(job, None)
        await ended
        return job.first_token_s - begin_s, job.end_s - begin_s, job.cached_tokens

    ends = await asyncio.gather(*(one(*request) for request in plan))
    engine.prompts.pool.check()
    return ends


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_accounted_engine_takes_the_times_of_the_simulated_one(tmp_path: Path, seed: int) -> None:
    plan = shared_load(seed, 40)
    simulated = run_virtually(simulated_ends(write_fake_model(tmp_path), plan))
    accounted = run_virtually(accounted_ends(plan))
    assert sum(cached for *_, cached in accounted) > 0
    for expected, actual in zip(simulated, accounted, strict=True):
        assert actual == pytest.approx(expected, abs=1e-6)


async def _last(batches: AsyncIterator[Any]) -> None:
    async for _ in batches:
        pass


PROMPTS = [list(range(20, 404)), list(range(128, 256))]
"""Of three chunks, and of one."""
SECOND_CHUNK_S = 0.015


def test_load_of_an_engine_in_a_prompts_second_chunk_has_what_is_left_of_it(tmp_path: Path) -> None:
    async def simulated() -> int | None:
        engine = simulated_engine(write_fake_model(tmp_path))
        await engine.start()
        stopping = Stopping(max_tokens=1)
        requests = (
            EngineRequest(request_id=f"r{len(p)}", token_ids=tuple(p), sampling=Sampling(), stopping=stopping)
            for p in PROMPTS
        )
        tasks = [asyncio.create_task(_last(generate(engine, request))) for request in requests]
        await asyncio.sleep(SECOND_CHUNK_S)
        waiting_tokens = (await engine.load()).waiting_tokens
        await asyncio.gather(*tasks)
        await engine.stop()
        return waiting_tokens

    async def accounted() -> int | None:
        engine = accounted_engine()
        for prompt in PROMPTS:
            engine.begin(Job(len(prompt), 1, tuple(block_hashes(prompt, PAGE)), ended=lambda job: None), None)
        await asyncio.sleep(SECOND_CHUNK_S)
        return engine.load().waiting_tokens

    assert run_virtually(simulated()) == run_virtually(accounted()) == 256 + 128


def test_a_run_of_decode_steps_takes_the_sum_of_its_steps() -> None:
    options = parse_options(OPTIONS)
    run, one_by_one = Run(3, 1000, 50, 1.0), 0.0
    for step in range(run.steps):
        one_by_one += Run(3, 1000 + 3 * step, 1, 1.0).time_s(options, 1)
        assert run.time_s(options, step + 1) == pytest.approx(one_by_one)
        assert run.steps_begun(options, one_by_one - 1e-9) == step + 1


def test_transfers_of_one_engine_share_its_link() -> None:
    async def arrivals() -> list[float]:
        # A prompt a second to compute, and two seconds to send.
        prefill, decode = pair({}, {}, prefill_tokens_per_s=512, chunked_prefill_tokens=512, transfer_bytes_per_s=2**25)
        arrived: list[float] = []
        ended = asyncio.Event()

        def end(job: Job) -> None:
            arrived.append(job.first_token_s)
            if len(arrived) == 3:
                ended.set()

        for _ in range(3):
            prefill.begin(Job(512, 1, (), ended=end), decode)
        await ended.wait()
        assert prefill.figures.transferred_bytes == 3 * 512 * 131_072
        return arrived

    assert run_virtually(arrivals()) == pytest.approx([3.0, 5.0, 7.0])


@settings(max_examples=examples(60), deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=25),
    blocks=st.integers(10, 40),
    capacity=st.integers(60, 400),
    running=st.integers(1, 4),
)
def test_tokens_add_up_and_no_memory_is_exceeded(
    lengths: list[tuple[int, int]], blocks: int, capacity: int, running: int
) -> None:
    """Every request ends once, with its tokens; neither cache nor decode memory is ever above its bound."""

    async def run() -> None:
        prefill, decode = pair(
            {"cache_blocks": blocks},
            {"kv_capacity_tokens": capacity, "running_requests_max": running},
            block_tokens=4,
            prefill_tokens_per_s=100,
            chunked_prefill_tokens=16,
        )
        pool, ended = prefill.prompts.pool, list[Job]()
        done = asyncio.Event()

        def check() -> None:
            pool.check()
            assert decode.memory.used_tokens <= capacity
            assert len(decode.batch) <= running

        def end(job: Job) -> None:
            check()
            ended.append(job)
            if len(ended) == len(lengths):
                done.set()

        for number, (prompt, answer) in enumerate(lengths):
            hashes = tuple(block_hashes([number % 3] * prompt, 4))
            prefill.begin(Job(prompt, answer, hashes, lambda job: check(), end), decode)
        await done.wait()
        assert len({id(job) for job in ended}) == len(lengths)
        assert prefill.figures.prompt_tokens == sum(prompt for prompt, _ in lengths)
        computed, cached = prefill.prompts.computed_tokens, prefill.figures.cached_tokens
        assert computed + cached == prefill.figures.prompt_tokens
        assert decode.batch.emitted_tokens == sum(answer for _, answer in lengths)
        assert decode.memory.used_tokens == 0
        assert pool.account().lent == pool.account().transferring == 0

    run_virtually(run())
