"""What Consul itself says while something is broken: whose counting it keeps, and why it refuses.

Owns the questions. Agents, and what breaks them, are `tests.integration.support.consul_host`'s.
"""

from __future__ import annotations

import base64

from tandem.errors import StartError
from tandem.testing.eventually import assert_eventually
from tests.faults.support.process_faults import prove_gone, prove_refused
from tests.integration.support.consul_host import ConsulHost

GENERATION_KEY = "tandem/generation"
"""Where registries keep the id of the registry that counts their revisions; gone with Consul's memory."""


async def generation(consul: ConsulHost) -> str:
    """The name of the present counting of revisions."""
    found = await consul.access.get(f"/v1/kv/{GENERATION_KEY}")
    return base64.b64decode(found[0]["Value"]).decode()


async def kill_first(consul: ConsulHost) -> None:
    """End the agent that registries speak with, and prove that it is gone."""
    pid = consul.first.pid
    await consul.kill(consul.first)
    await prove_gone(pid)
    await prove_refused(consul.address)


async def lose_leader(consul: ConsulHost) -> None:
    """End all servers but the first, and prove that it knows no leader and answers no question for want of one."""
    await consul.kill(*consul.agents[1:])
    await consul.wait_leaderless()

    async def refusal() -> str:
        try:
            # Consul holds a question for seven seconds before it gives up hope of a leader.
            await consul.access.get("/v1/catalog/services", timeout_s=10)
        except StartError as problem:
            return str(problem)
        return ""

    await assert_eventually(
        refusal, lambda words: "No cluster leader" in words, within_s=25, what="refusal of questions"
    )
