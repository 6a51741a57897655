"""A Consul agent that wants tokens and certificates, set up by the files and commands of deploy/consul."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.local_cluster.consul_http import ConsulAccess
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls
from tests.integration.conftest import REPOSITORY
from tests.integration.support.consul_host import ConsulHost, consul_agent

DEPLOY = REPOSITORY / "deploy" / "consul"


class GuardedConsul:
    """The agent, and tokens of the policies."""

    def __init__(self, host: ConsulHost, binary: Path, certs: Path) -> None:
        self.host = host
        self.certs = certs
        self.registry_tls = Tls.in_directory(certs, "registry")
        self._binary = binary
        self._management = ""

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.host.access.url

    def access(self, token: str) -> ConsulAccess:
        """As a client with that token, from the machine of a registry."""
        return ConsulAccess(address=self.url, token=token, ca=self.registry_tls.ca, tls=self.registry_tls)

    async def bootstrap(self) -> None:
        """The first token, which may do everything."""
        self._management = json.loads(await self.command("acl", "bootstrap", "-format=json"))["SecretID"]

    async def token(self, policy: str, node: str = "") -> str:
        """A token that may what deploy/consul/policies says."""
        rules = (DEPLOY / "policies" / f"{policy}.hcl").read_text().replace("NODE", node)
        name = f"tandem-{policy}"
        await self.command("acl", "policy", "create", f"-name={name}", f"-rules={rules}")
        made = await self.command("acl", "token", "create", f"-policy-name={name}", "-format=json")
        return str(json.loads(made)["SecretID"])

    async def command(self, *words: str) -> str:
        """Consul's own command, as an administrator calls it."""
        tls = self.registry_tls
        process = await asyncio.create_subprocess_exec(
            *(str(self._binary), *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **os.environ,
                "CONSUL_HTTP_ADDR": self.url,
                "CONSUL_CACERT": str(tls.ca),
                "CONSUL_CLIENT_CERT": str(tls.cert),
                "CONSUL_CLIENT_KEY": str(tls.key),
                "CONSUL_HTTP_TOKEN": self._management,
            },
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    async def as_manager(self, path: str) -> Any:
        """What is really there."""
        return await self.access(self._management).get(path)


@asynccontextmanager
async def guarded_consul(binary: Path, directory: Path) -> AsyncIterator[GuardedConsul]:
    """An agent with deploy/consul/server.hcl, but for its paths, its ports and its being alone; bootstrapped."""
    certs = directory / "certs"
    issue_all(certs)
    tls = Tls.in_directory(certs, "consul")
    alone = {"tls": tls, "client": Tls.in_directory(certs, "registry"), "configuration": (DEPLOY / "server.hcl",)}
    async with consul_agent(binary, directory / "consul", in_memory=False, **alone) as host:
        guarded = GuardedConsul(host, binary, certs)
        await guarded.bootstrap()
        agent = await guarded.token("agent", node=host.first.name)
        await guarded.command("acl", "set-agent-token", "agent", agent)
        await guarded.command("acl", "set-agent-token", "default", await guarded.token("dns"))
        host.first.spec = replace(host.first.spec, token=agent)
        yield guarded
