"""A controller on a cluster of processes: what it changes under load, what a dry run does, and that one of two acts."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.cli.plan_apply import apply_plan
from tandem.cli.recorded_load import recorded_cluster
from tandem.controller.app import ControllerApp
from tandem.controller.settings import ControllerConfig
from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.worker import WorkerRole
from tandem.engine.simulated.tokens import expected_tokens, read_vocabulary
from tandem.errors import StartError
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support.calls import generate, request_of
from tests.integration.support.command_line import TANDEM, run
from tests.integration.support.role_changes import (
    DECODE,
    PREFILL,
    assert_pages_free,
    change,
    exact_load,
    workers_of,
)
from tests.integration.support.scraped import samples, scrape

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
VOCABULARY = read_vocabulary(read_checkpoint(DEMO_MODEL))
CLIENTS = 6
WITHIN_S = 60.0
QUICK: dict[str, Any] = {
    "ttft_s": 5.0,
    # No engine is as fast: each further stream is one too many for a decode worker.
    "itl_s": 1e-4,
    "interval_s": 0.2,
    "window_s": 2.0,
    "confirm_s": 0.5,
    "settle_s": 0.5,
    "metrics_port": 0,
}


def asks(number: int) -> Iterator[tuple[pb.GenerateRequest, list[int]]]:
    for turn in itertools.count():
        prompt, count = f"Once {number} and {turn}", 60
        yield request_of(prompt, max_tokens=count), expected_tokens(VOCABULARY, TOKENIZER.encode(prompt).ids, count)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    flags = {"engine-extra": json.dumps({"decode_step_s": 0.004})}
    logs = tmp_path_factory.mktemp("controller")
    async with running(logs, engine="simulated", prefill=2, decode=1, worker_flags=flags) as cluster:
        yield cluster


def controller(fleet: LocalCluster, **more: Any) -> Any:
    return ControllerApp.open(ControllerConfig(registry=(fleet.registry.address,), **{**QUICK, **more}))


async def shown(app: ControllerApp, name: str, **labels: str) -> float:
    """The sum of a metric's series."""
    text = await scrape(f"127.0.0.1:{app.metrics_port}")
    return sum(value for own, found, value in samples(text) if own == name and labels.items() <= found.items())


async def roles(fleet: LocalCluster) -> dict[str, WorkerRole]:
    return {worker_id: worker.role for worker_id, worker in (await workers_of(fleet)).items()}


async def test_a_dry_run_decides_and_changes_nothing(fleet: LocalCluster) -> None:
    before = await workers_of(fleet)
    async with exact_load(fleet, CLIENTS, asks), controller(fleet, dry_run=True) as app:

        async def decided() -> float:
            return await shown(app, "tandem_controller_decisions_total", tandem_reason="dry_run")

        await assert_eventually(decided, lambda count: count > 0, within_s=WITHIN_S, what="decisions of the dry run")

        async def need() -> float:
            return await shown(app, "tandem_controller_need", tandem_role="decode")

        await assert_eventually(need, lambda value: value > 1, within_s=WITHIN_S, what="the need for decode workers")
        assert await shown(app, "tandem_controller_changes_total") == 0
        await app.drain()
    assert await workers_of(fleet) == before


async def test_one_of_two_controllers_gives_decode_a_worker_and_no_request_fails(fleet: LocalCluster) -> None:
    async with AsyncExitStack() as stack:
        load = await stack.enter_async_context(exact_load(fleet, CLIENTS, asks))
        apps = [await stack.enter_async_context(controller(fleet)) for _ in range(2)]

        async def changed() -> dict[str, WorkerRole]:
            return await roles(fleet)

        await assert_eventually(
            changed, lambda roles: [*roles.values()].count(DECODE) == 2, within_s=WITHIN_S, what="roles"
        )
        (taken,) = [one for one in (await workers_of(fleet)).values() if one.role is DECODE and one.epoch > 1 and
                    one.worker_id.startswith("prefill")]  # fmt: skip
        await load.wait_served_by(taken)

        async def refused() -> float:
            return sum(
                [await shown(app, "tandem_controller_decisions_total", tandem_reason="last_worker") for app in apps]
            )

        # The last prefill worker stays, however much the load wants it.
        await assert_eventually(refused, lambda count: count > 0, within_s=WITHIN_S, what="decisions")
        leaders = [await shown(app, "tandem_controller_leader") for app in apps]
        assert sorted(leaders) == [0.0, 1.0]
        done = [await shown(app, "tandem_controller_changes_total", tandem_outcome="done") for app in apps]
        assert done == leaders
        # A leader that leaves makes room at once.
        leader, other = (apps[leaders.index(value)] for value in (1.0, 0.0))
        assert await leader.drain()

        async def leads() -> float:
            return await shown(other, "tandem_controller_leader")

        await assert_eventually(leads, lambda value: value == 1.0, within_s=WITHIN_S, what="the other one leads")
        await other.drain()
    await change(fleet, taken.worker_id, PREFILL)
    await assert_pages_free(fleet)


async def test_a_plan_is_applied_and_one_that_needs_more_workers_is_refused(
    fleet: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, before = fleet.registry.address, await workers_of(fleet)
    await generate(fleet, request_of("Once upon a time", max_tokens=4))
    seen = await recorded_cluster([registry], None, model=None, window_s=60.0)
    with pytest.raises(StartError, match="needs 5 workers"):
        await apply_plan({PREFILL: 2, DECODE: 3}, seen, registry, None, is_agreed=True)
    assert await workers_of(fleet) == before
    async with exact_load(fleet, CLIENTS, asks):
        assert await apply_plan({PREFILL: 1, DECODE: 2}, seen, registry, None, is_agreed=True) == 0
    assert await roles(fleet) == {"prefill-0": PREFILL, "prefill-1": DECODE, "decode-0": DECODE}
    out = capsys.readouterr().out
    assert "  prefill-1: prefill -> decode\n" in out
    assert "prefill-1: has role decode, epoch " in out
    await change(fleet, "prefill-1", PREFILL)


async def test_the_command_refuses_settings_by_name(fleet: LocalCluster, tmp_path: Path) -> None:
    registry = ("--registry", fleet.registry.address)
    status, _, err = await run(*TANDEM, "controller", *registry, "--itl-s", "0.1", state=tmp_path / "none.json")
    assert (status, err) == (2, "tandem-controller: ttft_s: is required: a number of seconds above 0\n")
    goals = ("--ttft-s", "0.1", "--itl-s", "0.2")
    status, _, err = await run(*TANDEM, "controller", *registry, *goals, state=tmp_path / "none.json")
    assert status == 2
    assert err.startswith("tandem-controller: itl_s: must be at most ttft_s (0.1), not 0.2")
