"""A fleet over two hosts, on a network that is not the default route: families, small packets, latency, mistakes."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.network_address import join_address, split_address
from tandem.errors import StartError
from tandem.service import run_directory
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.command_line import TANDEM
from tests.integration.support.two_hosts import BRIDGE_ADDRESS, Host, HostProcess, two_hosts, why_not

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
slow_link = pytest.mark.skipif(why_not(delay=True) is not None, reason=str(why_not(delay=True)))

DELAY_S = 0.02
LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""
MTU = 1280
"""The least of IPv6, as in tunnels."""
SIMULATED = {"engine": "simulated", "engine-extra": '{"decode_step_s": 0.004}'}
SGLANG = {"engine": "sglang", "dtype": "float32", "canary-timeout-s": "120"}


@pytest.fixture
def run() -> Any:
    directory = run_directory.make()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def started(*processes: HostProcess, run: Path) -> AsyncIterator[None]:
    """They run, ready, and end at the end."""
    async with AsyncExitStack() as stack:
        for process in processes:
            stack.push_async_callback(process.stop)
            await process.start(run)
        await asyncio.gather(*(process.wait_ready() for process in processes))
        yield


def registry_on(host: Host, address: str, logs: Path) -> HostProcess:
    return HostProcess(host, "registry", "registry", {"host": address, "port": "0"}, logs)


def member(host: Host, role: str, address: str, registry: HostProcess, logs: Path, **flags: str) -> HostProcess:
    """A worker or frontend with the demo model."""
    given = {"host": address, "model": str(DEMO_MODEL), "registry": registry.address, "drain-settle-s": "0"}
    if role != "frontend":
        given |= {"worker-id": role} if "engine" in flags else {"worker-id": role, **SIMULATED}
    given |= {key.replace("_", "-"): value for key, value in flags.items()}
    return HostProcess(host, role, role, given, logs)


async def generated(host: Host, frontend: HostProcess) -> dict[str, Any]:
    """The last event of a generation that a client on that host asked for."""
    command = host.command(*TANDEM, "generate", "Once upon a time", "--json", "--address", frontend.address)
    process = await asyncio.create_subprocess_exec(
        *command, "--max-tokens", "12", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    finish: dict[str, Any] = json.loads(out.decode().splitlines()[-1])["finish"]
    return finish


def assert_kv_moved(finish: dict[str, Any]) -> None:
    assert int(finish["timings"]["kv_transfer_bytes"]) > 0, finish
    assert int(finish["timings"]["recomputed_tokens"]) == 0, finish


async def serves(
    near: Host,
    far: Host,
    addresses: tuple[str, str],
    logs: Path,
    run: Path,
    look: Callable[[Sequence[HostProcess]], None] = lambda fleet: None,
    **flags: str,
) -> None:
    """Registry, frontend and prefill on one host, decode and the client on the other; `look` sees what serves."""
    here, there = addresses
    registry = registry_on(near, here, logs)
    async with started(registry, run=run):
        fleet = [
            member(near, "prefill", here, registry, logs, **flags),
            member(far, "decode", there, registry, logs, **flags),
            member(near, "frontend", here, registry, logs),
        ]
        async with started(*fleet, run=run):
            assert [split_address(process.address)[0] for process in fleet] == [here, there, here]
            assert_kv_moved(await generated(far, fleet[-1]))
            look(fleet)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_a_pair_over_a_second_network_serves(family: str, tmp_path: Path, run: Path) -> None:
    with two_hosts(mtu=MTU) as (near, far):
        await serves(near, far, (getattr(near, family), getattr(far, family)), tmp_path, run)


@slow_link
async def test_a_slow_link_with_small_packets_serves(tmp_path: Path, run: Path) -> None:
    with two_hosts(mtu=MTU, delay_s=DELAY_S) as (near, far):
        await serves(near, far, (near.ipv6, far.ipv6), tmp_path, run)


async def test_listening_on_every_address_advertises_the_one_of_the_second_network(tmp_path: Path, run: Path) -> None:
    with two_hosts() as (near, far):
        registry = registry_on(near, "::", tmp_path)
        registry.flags["advertise-host"] = near.ipv4
        async with started(registry, run=run):
            fleet = [
                member(near, "prefill", "0.0.0.0", registry, tmp_path, advertise_host=near.ipv4),
                member(far, "decode", "::", registry, tmp_path, advertise_host=f"[{far.ipv6}]"),
                member(near, "frontend", "::", registry, tmp_path, advertise_host=near.ipv4),
            ]
            async with started(*fleet, run=run):
                assert_kv_moved(await generated(near, fleet[-1]))


async def test_an_address_that_both_hosts_have_is_named(tmp_path: Path, run: Path) -> None:
    with two_hosts() as (near, far):
        registry = registry_on(near, near.ipv4, tmp_path)
        async with started(registry, run=run):
            here = member(near, "prefill", "0.0.0.0", registry, tmp_path, advertise_host=BRIDGE_ADDRESS)
            async with started(here, run=run):
                warning = f"this process advertises {BRIDGE_ADDRESS}, the address of the bridge bridge0"
                assert warning in here.log.read_text()
                port = str(split_address(here.address)[1])
                there = member(far, "decode", "0.0.0.0", registry, tmp_path, advertise_host=BRIDGE_ADDRESS, port=port)
                async with started(there, run=run):
                    assert warning in there.log.read_text()
                    # Only one process can have an address: the registry takes the earlier start for dead.
                    assert await here.wait_ended() == StartError.exit_status
                reason = here.exit_summary()
                where = join_address(BRIDGE_ADDRESS, int(port))
                assert f"address {where} is already registered by worker decode" in reason
                assert "if the two run on different hosts, set advertise_host of both" in reason


async def test_a_worker_that_advertises_loopback_to_another_host_says_so(tmp_path: Path, run: Path) -> None:
    with two_hosts() as (near, far):
        registry = registry_on(near, near.ipv4, tmp_path)
        async with started(registry, run=run):
            worker = member(far, "decode", "127.0.0.1", registry, tmp_path)
            async with started(worker, run=run):
                text = worker.log.read_text()
                assert "this process advertises 127.0.0.1, which only this machine can call" in text
                assert f"({registry.address}): set advertise_host" in text


def listened_on(process: HostProcess) -> set[str]:
    """Addresses on which a worker or its engine listens, beside loopback, as its own network namespace has them."""
    found = set()
    for name in ("tcp", "tcp6"):
        lines = Path(f"/proc/{process.pid}/net/{name}").read_text().splitlines()[1:]
        for address, state in ((words[1].partition(":")[0], words[3]) for words in map(str.split, lines)):
            # The kernel writes words of 32 bits in its own byte order.
            parts = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
            if state == LISTENING:
                ip = ipaddress.ip_address(b"".join(parts))
                found.add(getattr(ip, "ipv4_mapped", None) or ip)
    return {str(address) for address in found if not address.is_loopback}


@pytest.mark.engine_sglang
@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt")
@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
async def test_the_real_engine_hands_kv_over_between_hosts(family: str, tmp_path: Path, run: Path) -> None:
    ucx = {"ucx_net_devices": "link0", "ucx_tls": "tcp"}
    if family == "ipv6":
        ucx["ucx_extra"] = '{"TCP_AF_PRIO": "inet6"}'

    def on_the_link_only(fleet: Sequence[HostProcess]) -> None:
        prefill, decode = fleet[:2]
        assert listened_on(prefill) == {getattr(near, family)}
        assert listened_on(decode) == {getattr(far, family)}

    with two_hosts(mtu=MTU) as (near, far):
        addresses = getattr(near, family), getattr(far, family)
        await serves(near, far, addresses, tmp_path, run, on_the_link_only, **SGLANG, **ucx)
