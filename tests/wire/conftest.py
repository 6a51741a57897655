"""One Consul agent for all wire tests; each test has a service name of its own there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.rpc.service_host import ServiceHost
from tests.integration.support.consul_host import ConsulHost, consul_agent
from tests.wire.support.server_kinds import KINDS


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def server_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[ServiceHost]:
    """Each of the two servers, in turn; registries of this process are served by it too."""
    found: type[ServiceHost] = request.param
    monkeypatch.setattr("tandem_registry.app.RpcServer", found)
    return found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def consul(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ConsulHost]:
    async with consul_agent(consul_binary, tmp_path_factory.mktemp("consul")) as host:
        yield host
