"""One Consul agent for all wire tests; each test has a service name of its own there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration.consul_host import ConsulHost, consul_agent


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def consul(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ConsulHost]:
    async with consul_agent(consul_binary, tmp_path_factory.mktemp("consul")) as host:
        yield host
