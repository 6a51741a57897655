"""A registry that starts before its Consul: it answers, it is not healthy, and it becomes so by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.client import calls
from tandem.testing.eventually import assert_eventually
from tests.integration.support.consul_host import consul_agent
from tests.integration.support.consul_registries import Site

pytestmark = pytest.mark.timeout(90)


async def test_a_registry_is_healthy_only_once_consul_has_answered(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path / "consul") as consul:
        await consul.kill(consul.first)
        async with Site(consul).process(tmp_path) as registry:
            assert not await calls.is_serving(registry.address)
            [log] = tmp_path.glob("registry-*.log")
            sentences = [line for line in log.read_text().splitlines() if "not ready: Consul is unreachable" in line]
            assert len(sentences) == 1
            assert consul.address in sentences[0]
            assert "this registry knows no membership yet" in sentences[0]
            assert "last known" not in log.read_text(), "there is none"

            await consul.restart(consul.first, empty=True)

            async def is_serving() -> bool:
                return await calls.is_serving(registry.address)

            await assert_eventually(is_serving, bool, within_s=20, what="a healthy registry")
            assert not (await calls.list_members(registry.address)).workers
