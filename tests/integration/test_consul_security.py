"""A registry and a Consul that trusts no client by default: tokens of least right, and certificates on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.errors import StartError
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls, client_tls
from tests.integration.support.consul_host import ConsulHost, consul_agent
from tests.integration.support.consul_registries import Site, scripted_worker, worker_ids

pytestmark = pytest.mark.timeout(120)
SERVICE = "guarded"
RULES = f"""
service "{SERVICE}" {{ policy = "write" }}
node_prefix "" {{ policy = "read" }}
key "{SERVICE}/generation" {{ policy = "write" }}
"""
MASTER = "11111111-2222-3333-4444-555555555555"
ACL = {"enabled": True, "default_policy": "deny", "tokens": {"master": MASTER, "agent": MASTER}}


@pytest_asyncio.fixture
async def consul(consul_binary: Path, tmp_path: Path) -> AsyncIterator[ConsulHost]:
    async with consul_agent(consul_binary, tmp_path, token=MASTER, more=(("acl", ACL),)) as host:
        yield host


async def make_token(consul: ConsulHost, name: str, rules: str = RULES) -> str:
    async def make() -> str:
        try:
            policy = await consul.access.put("/v1/acl/policy", {"Name": name, "Rules": rules})
            made = await consul.access.put("/v1/acl/token", {"Policies": [{"ID": policy["ID"]}]})
        except StartError as problem:
            raise AssertionError(problem) from None
        secret: str = made["SecretID"]
        return secret

    return await assert_eventually(make, within_s=10, what="a token")


async def test_a_token_of_least_right_is_enough(consul: ConsulHost, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(await make_token(consul, "registry") + "\n")
    site = Site(consul, SERVICE, {"consul_token_file": file})
    async with site.registry() as one, site.registry() as two, scripted_worker("w", one) as worker:
        await assert_eventually(lambda: worker_ids(two), lambda ids: ids == ["w"])
        await worker.server.set_serving(False)
        await assert_eventually(lambda: worker_ids(two), lambda ids: ids == [], within_s=6)


@pytest.mark.parametrize("token", ["", "99999999-2222-3333-4444-555555555555"], ids=["none", "unknown"])
async def test_a_token_that_may_not_is_one_sentence_without_it(consul: ConsulHost, token: str) -> None:
    site = Site(consul, SERVICE, {"consul_token": token} if token else {})
    with pytest.raises(StartError, match="rejected this registry's token") as refusal:
        async with site.registry():
            pass
    assert not token or token not in str(refusal.value)


async def test_a_token_that_was_renewed_in_its_file_is_taken(
    consul: ConsulHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text(first := await make_token(consul, "first"))
    site = Site(consul, SERVICE, {"consul_token_file": file})
    async with site.registry() as registry:
        file.write_text(second := await make_token(consul, "second"))
        tokens = await consul.access.get("/v1/acl/tokens")
        (old,) = [token["AccessorID"] for token in tokens if "'first'" in str(token.get("Policies"))]
        await consul.access.send("DELETE", f"/v1/acl/token/{old}")
        async with scripted_worker("w", registry):
            assert await worker_ids(registry) == ["w"]
    assert first not in caplog.text
    assert second not in caplog.text


async def test_certificates_on_both_sides(consul_binary: Path, tmp_path: Path) -> None:
    issue_all(certs := tmp_path / "certs")
    tls, client = Tls.in_directory(certs, "consul"), client_tls(certs)
    assert client is not None
    async with consul_agent(consul_binary, tmp_path, tls=tls, client=client) as consul:
        shown = {"consul_ca": client.ca, "consul_cert": client.cert, "consul_key": client.key}
        site = Site(consul, SERVICE, shown)
        async with site.registry() as registry, scripted_worker("w", registry):
            assert await worker_ids(registry) == ["w"]
            await asyncio.sleep(3)
            assert await worker_ids(registry) == ["w"], "plaintext members are checked as such"
