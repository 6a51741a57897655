"""The policies of deploy/consul on a real agent that denies by default and wants certificates: just enough, no more."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.errors import StartError
from tandem.local_cluster.consul_http import ConsulAccess
from tests.integration.support.consul_acl import DEPLOY, GuardedConsul, guarded_consul
from tests.integration.support.consul_host import dns_counts

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

NO_SUCH_NAME = 3
MEMBER = {"Name": "tandem", "ID": "tandem-decode-0", "Tags": ["decode"], "Address": "127.0.0.1", "Port": 7401}
OTHER = {"Name": "billing", "ID": "billing-0", "Port": 7402}
SIMILAR = {"Name": "tandem-blue", "ID": "tandem-blue-0", "Port": 7403}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def consul(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GuardedConsul]:
    async with guarded_consul(consul_binary, tmp_path_factory.mktemp("acl")) as guarded:
        manager = guarded.access(guarded._management)
        await manager.put("/v1/agent/service/register", OTHER)
        await manager.put("/v1/kv/billing/secret", b"for others")
        yield guarded


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def registry(consul: GuardedConsul) -> ConsulAccess:
    return consul.access(await consul.token("registry"))


async def refused(access: ConsulAccess, method: str, path: str, body: object = None) -> None:
    with pytest.raises(StartError, match=r"rejected the token \(403"):
        await access.send(method, path, body)


async def test_a_registry_may_do_its_work(consul: GuardedConsul, registry: ConsulAccess) -> None:
    await registry.put("/v1/agent/service/register", {**MEMBER, "Check": {"TTL": "1h", "Status": "passing"}})
    await registry.put(f"/v1/agent/check/pass/service:{MEMBER['ID']}")
    (found,) = await registry.get("/v1/health/service/tandem?passing=1")
    assert found["Service"]["ID"] == MEMBER["ID"]
    assert found["Node"]["Node"] == consul.host.first.name
    assert await registry.get(f"/v1/agent/service/{MEMBER['ID']}")
    assert await registry.put("/v1/kv/tandem/generation?cas=0", b"one") is True
    assert await registry.put("/v1/kv/tandem/generation?cas=0", b"two") is False
    assert await registry.put("/v1/kv/tandem/leader/roles-of-workers?cas=0", b"one") is True
    (key,) = await registry.get("/v1/kv/tandem/generation?consistent")
    assert base64.b64decode(key["Value"]) == b"one"
    elsewhere = {"Node": consul.host.first.name, "ServiceID": MEMBER["ID"]}
    await registry.put("/v1/catalog/deregister", elsewhere)
    await registry.put(f"/v1/agent/service/deregister/{MEMBER['ID']}")
    assert await registry.get("/v1/health/service/tandem") == []


async def test_a_registry_may_do_nothing_else(consul: GuardedConsul, registry: ConsulAccess) -> None:
    for service in (OTHER, SIMILAR):
        await refused(registry, "PUT", "/v1/agent/service/register", service)
    await refused(registry, "PUT", f"/v1/agent/service/deregister/{OTHER['ID']}")
    await refused(registry, "PUT", f"/v1/agent/service/maintenance/{OTHER['ID']}?enable=true")
    await refused(registry, "PUT", "/v1/catalog/deregister", {"Node": consul.host.first.name})
    node = {"Node": "intruder", "Address": "127.0.0.9"}
    await refused(registry, "PUT", "/v1/catalog/register", node)
    for key in ("billing/secret", "tandem/other", "tandem/leader", "tandem-blue/generation", "generation"):
        await refused(registry, "PUT", f"/v1/kv/{key}", b"mine")
        await refused(registry, "DELETE", f"/v1/kv/{key}")
    await refused(registry, "GET", "/v1/kv/billing/secret")
    await refused(registry, "GET", "/v1/acl/tokens")
    await refused(registry, "PUT", "/v1/acl/policy", {"Name": "mine", "Rules": 'acl = "write"'})
    for path in ("leave", "force-leave/consul", "reload", "maintenance?enable=true"):
        await refused(registry, "PUT", f"/v1/agent/{path}")
    await refused(registry, "GET", "/v1/agent/self")
    await refused(registry, "PUT", "/v1/session/create", {"Node": consul.host.first.name})
    await refused(registry, "PUT", "/v1/event/fire/deploy")
    await refused(registry, "GET", "/v1/operator/raft/configuration")
    # What may not be read is not refused but left out.
    assert await registry.get("/v1/health/service/billing") == []
    assert "billing" not in await registry.get("/v1/catalog/services")
    assert await consul.as_manager("/v1/health/service/billing")
    assert await consul.as_manager("/v1/kv/billing/secret")


async def test_without_a_token_or_with_a_wrong_one_nothing_is_readable(consul: GuardedConsul) -> None:
    for token in ("", "11111111-2222-3333-4444-555555555555"):
        outsider = ConsulAccess(address=consul.url, token=token, ca=consul.registry_tls.ca, tls=consul.registry_tls)
        # Without one, the agent takes its own default, which is that of DNS.
        await refused(outsider, "PUT", "/v1/agent/service/register", MEMBER)
        await refused(outsider, "GET", "/v1/kv/tandem/generation")
        await refused(outsider, "PUT", "/v1/kv/tandem/generation", b"mine")


async def test_without_a_certificate_there_is_no_answer_at_all(consul: GuardedConsul, registry: ConsulAccess) -> None:
    bare = ConsulAccess(address=consul.url, token=registry.token, ca=consul.registry_tls.ca)
    with pytest.raises(StartError, match=r"is unreachable|no valid response"):
        await bare.get("/v1/health/service/tandem")


async def test_dns_lists_this_cluster_and_no_other(consul: GuardedConsul, registry: ConsulAccess) -> None:
    await registry.put("/v1/agent/service/register", MEMBER)
    assert await dns_counts(consul.host.first, "decode.tandem.service.consul") == (0, 1)
    assert await dns_counts(consul.host.first, "billing.service.consul") == (NO_SUCH_NAME, 0)
    await registry.put(f"/v1/agent/service/deregister/{MEMBER['ID']}")


async def test_the_commands_of_the_page_are_those_of_this_test(consul: GuardedConsul) -> None:
    page = (DEPLOY / "README.md").read_text()
    for command in ("acl bootstrap", "acl policy create", "acl token create", "acl set-agent-token"):
        assert f"consul {command}" in page
    for file in ("server.hcl", *(f"policies/{file.name}" for file in (DEPLOY / "policies").iterdir())):
        assert file in page
    validated = await asyncio.create_subprocess_exec(
        str(consul._binary), "validate", "-quiet", str(DEPLOY / "server.hcl"), stdout=asyncio.subprocess.DEVNULL
    )
    assert await validated.wait() == 0
