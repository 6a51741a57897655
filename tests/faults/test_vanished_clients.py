"""Clients that vanish without a word: no FIN and no reset ever comes, and no deadline was set.

The client is on another machine (a network namespace) whose link is cut, or it is a frozen process. Its request is held
in a phase meanwhile, so that only the end of its connection can end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.http2 import limits
from tandem.testing.eventually import assert_eventually
from tests.faults.support.fault_cluster import DEMO_MODEL
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S, assert_idle, fired, inject
from tests.faults.support.leg_report import LINES
from tests.faults.support.namespace import OtherMachine, is_possible, other_machine
from tests.faults.support.process_faults import state_of
from tests.faults.test_leg_cancels import HOLDS, both_have_it, request, rules

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(90)]

EDGE_BOUND_S = 3.0
FRONTEND_BOUND_S = limits.PING_AFTER_S + limits.PING_TIMEOUT_S
ROUND_S = 1.0
"""The kernel's timers of TCP are coarse, and a request that is sent again may begin a new wait."""


@pytest.fixture(scope="module")
def machine() -> Iterator[OtherMachine]:
    if not is_possible():
        pytest.skip("needs root and iproute2, to make network namespaces")
    with other_machine() as machine:
        yield machine


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(machine: OtherMachine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("vanished")
    engine = {"chunked_prefill_tokens": 64, "prefix_cache": False}
    flags = {
        role: {"engine-extra": json.dumps({**engine, "control_file": str(logs / f"{role}.rules")})}
        for role in ("prefill", "decode")
    }
    flags["frontend"] = {"host": machine.our_address}
    flags["edge"] = {
        "host": machine.our_address, "insecure-open": "true", "client-silence-timeout-s": str(EDGE_BOUND_S),
    }  # fmt: skip
    spec = ClusterSpec(model=DEMO_MODEL, log_directory=logs, engine="simulated", edge=True, role_flags=flags)
    async with LocalCluster(spec) as cluster:
        yield cluster


@asynccontextmanager
async def streaming(machine: OtherMachine, kind: str, address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client on the other machine that has sent its request."""
    command = [sys.executable, "-m", "tests.faults.support.streaming_client", kind, address, json.dumps(request())]
    client = await asyncio.create_subprocess_exec(
        *machine.command(*command), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert client.stdout is not None
        assert await client.stdout.readline() == b"begun\n"
        yield client
    finally:
        with contextlib.suppress(ProcessLookupError):  # one behind a cut link may have given up by itself
            os.killpg(client.pid, signal.SIGKILL)
        await client.wait()


CASES = [
    (kind, how, phase)
    for kind, how in (("http1", "cut"), ("http2", "cut"), ("http2", "frozen"), ("grpc", "cut"), ("grpc", "frozen"))
    for phase in ("bootstrapping", "decoding")
]
SMOKE = {("http1", "cut", "bootstrapping"), ("http1", "cut", "decoding"), ("http2", "frozen", "bootstrapping")}


@pytest.mark.parametrize(
    ("kind", "how", "phase"),
    [pytest.param(*case, marks=() if case in SMOKE else pytest.mark.fault_matrix) for case in CASES],
)
async def test_a_client_that_vanished_leaves_both_engines_within_the_bound(
    machine: OtherMachine, cluster: LocalCluster, kind: str, how: str, phase: str
) -> None:
    assert cluster.edge is not None
    role, rule = HOLDS[phase]
    address, bound_s = (
        (cluster.frontend.address, FRONTEND_BOUND_S) if kind == "grpc" else (cluster.edge.address, EDGE_BOUND_S)
    )
    await assert_idle(cluster.workers)
    before = len(fired(rules(cluster, role)))
    inject(rules(cluster, role), rule)
    try:
        async with streaming(machine, kind, address) as client:
            await both_have_it(cluster, phase, before)
            vanished_s = now_s()
            if how == "cut":
                machine.cut()
            else:
                client.send_signal(signal.SIGSTOP)
                await assert_eventually(lambda: state_of(client.pid), "T".__eq__, what="a stopped client")
            await assert_idle(cluster.workers, bound_s + ROUND_S + IDLE_WITHIN_S + BUSY_MACHINE_S)
            took_s = now_s() - vanished_s
            # What a client behind a cut link says in the end reaches no one.
            assert how == "cut" or state_of(client.pid) == "T", "void: the client ran"
    finally:
        machine.heal()
        inject(rules(cluster, role))
    LINES.append(f"{kind} client {how}, {phase}: both engines idle after {took_s:.1f} s")


async def test_a_silent_client_that_is_there_keeps_its_request(machine: OtherMachine, cluster: LocalCluster) -> None:
    """A prefill of three times the bound: the client's machine answers, so nothing is given up."""
    assert cluster.edge is not None
    role, rule = HOLDS["bootstrapping"]
    before = len(fired(rules(cluster, role)))
    inject(rules(cluster, role), rule)
    async with streaming(machine, "http2", cluster.edge.address) as client:
        await both_have_it(cluster, "bootstrapping", before)
        begin_s = now_s()
        await assert_eventually(lambda: now_s() > begin_s + 3 * EDGE_BOUND_S, within_s=20, what="a long prefill")
        inject(rules(cluster, role))
        assert client.stdout is not None
        assert await asyncio.wait_for(client.stdout.readline(), 10) == b"event\n"
