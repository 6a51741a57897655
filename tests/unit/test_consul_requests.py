"""The registry's requests to Consul, as an agent receives them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from tandem_registry.backends.consul.client import ConsulClient, HealthResponse
from tandem_registry.backends.consul.settings import ConsulSettings


@asynccontextmanager
async def asked(body: bytes) -> AsyncIterator[tuple[ConsulClient, list[web.BaseRequest]]]:
    """A client of an agent that answers everything with `body` at index 7, and what came there."""
    requests: list[web.BaseRequest] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        requests.append(request)
        return web.Response(body=body, headers={"X-Consul-Index": "7"})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    client = ConsulClient(ConsulSettings(address=f"{host}:{port}"), interval_s=1, checks_tls=False)
    try:
        yield client, requests
    finally:
        await client.close()
        await runner.cleanup()


async def test_the_service_is_asked_for_uncompressed_and_handed_on_unread() -> None:
    """To compress megabytes takes a near agent longer than to send them."""
    body = b"x" * 3_000_000
    async with asked(body) as (client, requests):
        assert await client.health() == HealthResponse(7, body)
        assert await client.health(HealthResponse(6, None), 0.5) == HealthResponse(7, body)
        assert await client.health(HealthResponse(7, None), 0.5) == HealthResponse(7, None)
    assert {request.headers["Accept-Encoding"] for request in requests} == {"identity"}
    assert dict(requests[1].query) == {"index": "6", "wait": "500ms"}


async def test_the_index_alone_is_asked_for_without_the_service() -> None:
    async with asked(b"[]") as (client, requests):
        assert await client.index() == 7
    assert dict(requests[0].query) == {"consistent": "1", "filter": 'Service.ID == ""'}
