"""Real Consul agents for a test: one that starts at once, or servers that elect a leader and can be broken.

    async with consul_servers(binary, tmp_path, count=3) as consul:
        await consul.kill(await consul.leader())
        await consul.wait_leaderless()

Each fault returns when it can be seen from outside: a process that has ended, a state that the kernel shows, a leader
that no server knows any more.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from tandem.errors import StartError
from tandem.local_cluster.consul_agent import AgentPorts, AgentSpec, ConsulAgent
from tandem.local_cluster.consul_http import ConsulAccess
from tandem.testing.eventually import assert_eventually

ELECTION_S = 20.0


class ConsulHost:
    """The agents of one test."""

    def __init__(self, agents: list[ConsulAgent], run: Path) -> None:
        self.agents = agents
        self._run = run

    @property
    def first(self) -> ConsulAgent:
        return self.agents[0]

    @property
    def address(self) -> str:
        """host:port of the first agent's HTTP."""
        return self.first.access.url.partition("://")[2]

    @property
    def dns(self) -> str:
        """host:port of the first agent's DNS."""
        return self.first.dns

    @property
    def access(self) -> ConsulAccess:
        """How to ask the first agent."""
        return self.first.access

    async def start(self) -> None:
        """Start all of them; return when each knows the leader."""
        for agent in self.agents:
            await agent.start(self._run)
        await asyncio.gather(*(agent.wait_ready() for agent in self.agents))

    async def end(self) -> None:
        """End all of them, those that are paused too."""
        for agent in self.agents:
            agent.signal(signal.SIGCONT)
        await asyncio.gather(*(agent.stop() for agent in self.agents))

    async def kill(self, *agents: ConsulAgent) -> None:
        """SIGKILL; returns when no process listens there any more."""
        for agent in agents:
            agent.kill()
        for agent in agents:
            await agent.wait_ended()
            await self.wait_refused(agent)

    async def stop(self, *agents: ConsulAgent) -> None:
        """SIGTERM: an end in order, without leaving."""
        for agent in agents:
            await agent.stop()

    async def pause(self, *agents: ConsulAgent) -> None:
        """SIGSTOP; returns when the kernel shows it."""
        for agent in agents:
            agent.signal(signal.SIGSTOP)
            process = psutil.Process(agent.pid)
            await _until(process.status, lambda status: status == psutil.STATUS_STOPPED, "a stopped agent")

    def resume(self, *agents: ConsulAgent) -> None:
        """SIGCONT."""
        for agent in agents:
            agent.signal(signal.SIGCONT)

    async def restart(self, *agents: ConsulAgent, empty: bool = False) -> None:
        """Start agents again that have ended, at the same ports; return when each knows the leader."""
        for agent in agents:
            if empty:
                agent.forget()
            await agent.start(self._run)
        await asyncio.gather(*(agent.wait_ready() for agent in agents))

    async def restart_empty(self) -> None:
        """Kill all of them and start them without their data."""
        await self.kill(*(agent for agent in self.agents if agent.runs))
        await self.restart(*self.agents, empty=True)

    async def leader(self) -> ConsulAgent:
        """The agent that leads, as one that runs says."""
        for agent in self.agents:
            if agent.runs and (address := await agent.leader()):
                port = int(address.rpartition(":")[2])
                return next(agent for agent in self.agents if agent.ports.server == port)
        raise AssertionError("no agent knows a leader")

    async def followers(self) -> list[ConsulAgent]:
        """The agents that do not lead."""
        leader = await self.leader()
        return [agent for agent in self.agents if agent is not leader]

    async def wait_leader(self, agents: Iterable[ConsulAgent] = ()) -> None:
        """Return when each of the agents (default: those that run) knows a leader, and that one runs."""
        asked = list(agents) or [agent for agent in self.agents if agent.runs]
        running = {f"127.0.0.1:{agent.ports.server}" for agent in self.agents if agent.runs}

        async def known() -> list[str]:
            return [await agent.leader() for agent in asked]

        # The others name a leader that has died until they miss its heartbeat.
        await assert_eventually(known, lambda found: set(found) <= running, within_s=ELECTION_S, what="a leader")

    async def wait_leaderless(self) -> None:
        """Return when every agent that runs says that there is no leader, in answers to writes too."""
        asked = [agent for agent in self.agents if agent.runs]

        async def known() -> list[str]:
            return [await agent.leader() for agent in asked]

        await assert_eventually(known, lambda found: not any(found), within_s=ELECTION_S, what="the loss of the leader")

    async def wait_refused(self, agent: ConsulAgent) -> None:
        """Return when its HTTP port refuses connections."""

        async def refused() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", agent.ports.http)
            except ConnectionRefusedError:
                return True
            writer.close()
            return False

        await assert_eventually(refused, bool, within_s=5, what="a refused connection")

    async def services(self, name: str = "tandem") -> list[dict[str, Any]]:
        """What Consul says of a service, health included."""
        found: list[dict[str, Any]] = await self.access.get(f"/v1/health/service/{name}")
        return found


async def dns_counts(agent: ConsulAgent, name: str) -> tuple[int, int]:
    """Status and number of answers that an agent's DNS gives to a question for addresses, over TCP."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = b"\x00\x01\x01\x00\x00\x01" + bytes(6) + labels + b"\x00\x00\x01\x00\x01"
    reader, writer = await asyncio.open_connection("127.0.0.1", agent.ports.dns)
    writer.write(len(question).to_bytes(2, "big") + question)
    answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    writer.close()
    await writer.wait_closed()
    return answer[3] & 15, int.from_bytes(answer[6:8], "big")


async def _until(look: Any, accepted: Any, what: str) -> None:
    async def now() -> Any:
        return look()

    await assert_eventually(now, accepted, within_s=5, what=what)


@asynccontextmanager
async def consul_agent(binary: Path, directory: Path, **spec: Any) -> AsyncIterator[ConsulHost]:
    """One agent that forgets at its end and elects within half a second. `spec`: fields of AgentSpec."""
    spec = {"in_memory": True, **spec}
    async with _running(ConsulHost([ConsulAgent(binary, directory, AgentSpec(**spec))], directory)) as host:
        yield host


@asynccontextmanager
async def consul_servers(binary: Path, directory: Path, count: int = 3, **spec: Any) -> AsyncIterator[ConsulHost]:
    """Servers that keep their data and elect a leader among them: within seconds, at the start and after a fault."""
    drawn = [AgentPorts.draw() for _ in range(count)]
    agents = []
    for number in range(count):
        join = tuple(ports.serf for ports in drawn if ports is not drawn[number])
        agent = ConsulAgent(binary, directory, AgentSpec(name=f"consul-{number}", servers=count, join=join, **spec))
        agent.ports = drawn[number]
        agents.append(agent)
    async with _running(ConsulHost(agents, directory)) as host:
        yield host


@asynccontextmanager
async def _running(host: ConsulHost) -> AsyncIterator[ConsulHost]:
    try:
        await host.start()
    except StartError:
        await host.end()
        raise
    try:
        yield host
    finally:
        await host.end()
