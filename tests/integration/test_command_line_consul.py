"""`tandem up --consul`: an agent of its own and its faults, and one that runs already and wants a token."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tandem.local_cluster.consul_http import ConsulAccess
from tandem.testing.eventually import assert_eventually
from tests.integration.support.command_line import (
    SIMULATED,
    TANDEM,
    children_of,
    cluster_up,
    gone,
    line_with,
    output_of,
    run,
    started,
    state_of,
    words_of,
)
from tests.integration.support.consul_acl import GuardedConsul, guarded_consul

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def consul_on_path(consul_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tandem up` starts is what these tests have."""
    monkeypatch.setenv("PATH", f"{consul_binary.parent}:{os.environ['PATH']}")


@pytest_asyncio.fixture
async def guarded(consul_binary: Path, tmp_path: Path) -> AsyncIterator[GuardedConsul]:
    async with guarded_consul(consul_binary, tmp_path) as consul:
        yield consul


async def observed(state: Path) -> dict[str, Any]:
    status, out, err = await run(*TANDEM, "status", "--json", state=state)
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


async def sources(state: Path) -> set[str]:
    return {registry.get("source", "") for registry in (await observed(state))["registries"]}


async def generated(state: Path) -> None:
    status, out, err = await run(*TANDEM, "generate", "Once upon a time", "--max-tokens", "5", state=state)
    assert (status, bool(out.strip())) == (0, True), err


def child(up: asyncio.subprocess.Process, word: str) -> psutil.Process:
    return next(found for found in children_of(up) if any(word in part for part in words_of(found)[:4]))


async def test_an_agent_of_its_own_serves_and_is_no_loss(state: Path) -> None:
    async with cluster_up(state, "--consul", "--registries", "2", "--no-edge") as up:
        cluster_state = state_of(state)
        assert len(cluster_state["registry"].split(",")) == 2
        assert await ConsulAccess(address=cluster_state["consul"]).get("/v1/catalog/services")
        found = await observed(state)
        assert {entry["worker"]["worker_id"] for entry in found["workers"]} == {"prefill-0", "decode-0"}
        assert all(entry["lease_age"].endswith("s") and entry["lease_keeper"] for entry in found["workers"])
        assert {entry["health"] for entry in found["workers"]} == {"LISTED_HEALTH_PASSING"}
        assert len({(r["registry_id"], r["revision"]) for r in found["registries"]}) == 1
        assert len({r["replica_id"] for r in found["registries"]}) == 2
        await generated(state)

        consul = child(up, "agent")
        consul.suspend()
        await assert_eventually(
            lambda: sources(state), lambda found: found == {"VIEW_SOURCE_LAST_KNOWN"}, within_s=60, what="a last view"
        )
        _, out, _ = await run(*TANDEM, "status", state=state)
        assert out.count("last known since ") == 2
        assert out.count("s ago") == 2
        await generated(state)
        consul.kill()
        assert "restarting in 1 s" in await line_with(up, "consul was killed by signal 9")
        assert cluster_state["consul"].partition("://")[2] in await line_with(up, "consul is ready again")
        await assert_eventually(
            lambda: sources(state), lambda found: found == {"VIEW_SOURCE_LIVE"}, within_s=60, what="a live view"
        )
        await generated(state)

        children, data = children_of(up), Path(cluster_state["log"]) / "consul-data"
        assert data.is_dir()
        up.send_signal(signal.SIGINT)
        assert await up.wait() == 0
        shown = (await output_of(up)).partition("stopping (Ctrl-C again to end at once)")[2]
        steps = [
            shown.index(f"{name:<14} {word}") for name in ("decode-0", "registry-1", "consul") for word in ("ended",)
        ]
        assert steps == sorted(steps)
        assert not [child for child in children if child.is_running()]
        assert not data.exists()
        assert list(Path(cluster_state["log"]).glob("*.log"))


async def test_nothing_is_left_when_up_itself_is_killed(state: Path) -> None:
    async with cluster_up(state, "--consul", "--no-edge") as up:
        children = children_of(up)
        assert any("agent" in words_of(child) for child in children)
        up.kill()
        await up.wait()
        await gone(children, within_s=15)


def holders(processes: list[psutil.Process], secret: str) -> tuple[set[str], set[str]]:
    """Modules of the processes that have it on their command line, and of those that have it in their environment."""
    said, had = set(), set()
    for process in processes:
        words = process.cmdline()
        module = words[2] if words[1:2] == ["-m"] else words[0]
        if any(secret in word for word in words):
            said.add(module)
        if any(secret in value for value in process.environ().values()):
            had.add(module)
    return said, had


@pytest.mark.parametrize("by_file", [True, False])
async def test_a_running_agent_is_used_with_a_token_that_is_not_shown(
    state: Path, tmp_path: Path, guarded: GuardedConsul, by_file: bool
) -> None:
    secret = await guarded.token("registry")
    (tmp_path / "token").write_text(f"{secret}\n")
    options = ["--consul", guarded.url, "--tls", str(guarded.certs), "--registries", "2", "--no-edge"]
    options += ["--consul-token-file", str(tmp_path / "token")] if by_file else []
    env = {} if by_file else {"CONSUL_HTTP_TOKEN": secret}
    async with cluster_up(state, *options, **env) as up:
        await generated(state)

        async def health() -> set[str]:
            return {
                check["Status"]
                for entry in await guarded.as_manager("/v1/health/service/tandem")
                for check in entry["Checks"]
            }

        # The agent shows its certificate to members, who refuse every client without one.
        await asyncio.sleep(6)
        await assert_eventually(health, lambda found: found == {"passing"}, within_s=20, what="passing checks")
        assert {entry["health"] for entry in (await observed(state))["workers"]} == {"LISTED_HEALTH_PASSING"}
        said, had = holders(children_of(up), secret)
        assert (said, had) == (set(), set() if by_file else {"tandem_registry"})
        cluster_state = state_of(state)
        assert cluster_state["consul"] == guarded.url
        written = [
            file for file in state.parent.rglob("*") if file.is_file() and secret in file.read_text(errors="replace")
        ]
        assert written == []
        up.send_signal(signal.SIGINT)
        assert await up.wait() == 0
        assert secret not in await output_of(up)
    assert await guarded.as_manager("/v1/health/service/tandem") == []


@pytest.mark.parametrize("token", [None, "11111111-2222-3333-4444-555555555555"])
async def test_without_the_right_token_nothing_serves_and_one_sentence_says_why(
    state: Path, tmp_path: Path, guarded: GuardedConsul, token: str | None
) -> None:
    options = ["--consul", guarded.url, "--tls", str(guarded.certs), "--no-edge", "--log-dir", str(tmp_path / "logs")]
    env = {} if token is None else {"CONSUL_HTTP_TOKEN": token}
    async with started(state, "up", *SIMULATED, *options, **env) as up:
        last = (await output_of(up)).splitlines()[-1]
        assert await up.wait() in (1, 2)
    assert last.startswith("tandem up: ")
    assert "Consul" in last
    assert "token" in last
    assert not state.exists()
