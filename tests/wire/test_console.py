"""The console over HTTP: its key, its origin, its headers, and what each path answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import uvloop
from tandem_frontend.app import FrontendApp
from tandem_frontend.config import FrontendConfig
from tandem_frontend.console import connections, server
from tandem_frontend.console.access import ConsoleKeys
from tandem_frontend.console.pages import HEADERS
from tandem_frontend.console.server import Console

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import calls
from tandem.domain.frontend import Frontend
from tandem.domain.network_address import join_address
from tandem.errors import ConfigError, StartError, TandemError
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls
from tests.wire.support.registry_host import make_worker
from tests.wire.support.scripted_registry import ScriptedRegistry, play_registry

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
KEY = "k" * 24
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
DATA_PATHS = ("/api/fleet", "/api/requests", "/api/requests/x", "/api/models", "/api/anything")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "console.keys"
    file.write_text(f"ops: {KEY}\n")
    return file


def settings(registry: ScriptedRegistry, keys: Path, **more: object) -> FrontendConfig:
    fields = {"registry": (registry.address,), "model": MODEL, "console_port": 0, "console_keys": keys, **more}
    return FrontendConfig.model_validate(fields)


@asynccontextmanager
async def console(keys: Path, **more: object) -> AsyncIterator[tuple[ScriptedRegistry, aiohttp.ClientSession]]:
    """A frontend with a console, and a client of it."""
    registry = ScriptedRegistry()
    registry.workers = (make_worker(model="tandem-demo"),)
    async with play_registry(registry), FrontendApp.open(settings(registry, keys, **more)) as app:
        base = f"http://{join_address('127.0.0.1', app.console_port)}"
        async with aiohttp.ClientSession(base) as session:
            yield registry, session


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


async def test_console_without_the_key_serves_the_page_and_no_data(keys: Path) -> None:
    async with console(keys) as (_, session):
        for path in ("/", "/console.js", "/console.css", "/icon.svg"):
            async with session.get(path) as response:
                assert response.status == 200, path
                assert {name: response.headers.get(name) for name in HEADERS} == HEADERS
        for path in DATA_PATHS:
            for headers in ({}, {"Authorization": "Bearer wrong-key-wrong-key"}, {"Cookie": f"key={KEY}"}):
                async with session.get(f"{path}?key={KEY}", headers=headers) as response:
                    assert response.status == 401, path
                    assert (await response.json())["error"]["code"] == "invalid_api_key"
                    assert {name: response.headers.get(name) for name in HEADERS} == HEADERS


async def test_console_refuses_pages_of_other_origins_and_other_methods(keys: Path) -> None:
    async with console(keys) as (_, session):
        for foreign in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            async with session.get("/api/requests", headers={**AUTHORIZED, **foreign}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (403, "forbidden_origin")
                assert not [name for name in response.headers if name.lower().startswith("access-control")]
        async with session.options(
            "/api/requests", headers={**AUTHORIZED, "Origin": str(session._base_url)}
        ) as response:
            assert response.status == 405
        for path in ("/../server.py", "/%2e%2e/server.py", "/static/", "/nothing"):
            async with session.get(path) as response:
                assert response.status == 404, path


async def test_console_sends_the_fleet_and_its_changes_until_the_key_is_revoked(keys: Path) -> None:
    async with console(keys) as (registry, session), session.get("/api/fleet", headers=AUTHORIZED) as response:
        assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
        stream = events(response)
        event = await anext(stream)
        assert (event["is_whole"], event["model"], [row["id"] for row in event["workers"]]) == (
            True, "tandem-demo", ["decode-0"],
        )  # fmt: skip
        assert event["is_registry_live"]
        registry.step(0, 1, [make_worker("<b>x", model="tandem-demo", address="127.0.0.1:9")])
        async with asyncio.timeout(30):
            # Rows of other workers come too: their health changes meanwhile.
            while "<b>x" not in {row["id"] for row in event["workers"]}:
                event = await anext(stream)
        assert not event["is_whole"]
        keys.write_text(f"ops: {'o' * 24}\n")
        async with asyncio.timeout(30):
            async for _ in stream:
                """Those that were on their way."""


async def test_console_has_a_limit_of_viewers_and_frees_their_places(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "VIEWERS_MAX", 1)
    async with console(keys) as (_, session):
        async with session.get("/api/fleet", headers=AUTHORIZED) as first:
            await anext(events(first))
            async with session.get("/api/fleet", headers=AUTHORIZED) as second:
                assert (second.status, (await second.json())["error"]["code"]) == (503, "too_many_viewers")

        async def is_let_in() -> bool:
            async with session.get("/api/fleet", headers=AUTHORIZED) as response:
                return response.status == 200

        await assert_eventually(is_let_in)


async def test_console_of_an_unknown_request_says_that_no_frontend_has_it(keys: Path) -> None:
    async with console(keys) as (_, session):
        async with session.get("/api/requests/missing", headers=AUTHORIZED) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (404, "request_not_found")
        async with session.get(f"/api/requests/{'x' * 300}", headers=AUTHORIZED) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, "request_id")
        async with session.get("/api/requests", headers=AUTHORIZED) as response:
            assert await response.json() == {"requests": [], "silent": []}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", "body"),
        (b"[]", "body"),
        (b"[" * 50_000, "body"),
        (b'{"prompt": 7}', "body"),
        (b'{"unknown": 1}', "body"),
        (b'{"prompt": "x", "stopping": {"max_tokens": -1}}', "stopping.max_tokens"),
        (b"\xff\xfe", "body"),
    ],
)
async def test_playground_of_a_wrong_request_names_the_field(keys: Path, body: bytes, param: str) -> None:
    async with console(keys) as (_, session):
        headers = {**AUTHORIZED, "Content-Type": "application/json"}
        async with session.post("/api/generate", data=body, headers=headers) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, param)


async def test_playground_of_a_large_body_is_refused_as_json(keys: Path) -> None:
    async with console(keys) as (_, session):
        headers = {**AUTHORIZED, "Content-Type": "application/json"}
        async with session.post("/api/generate", data=b"[" * 100_000, headers=headers) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (413, "invalid_request")


async def test_playground_takes_json_only_and_requests_show_whose_key_it_was(keys: Path) -> None:
    async with console(keys, no_worker_wait_s=0) as (registry, session):
        async with session.post("/api/generate", data=b"{}", headers=AUTHORIZED) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, "content-type")
        registry.step(0, 1, removed=list(registry.workers))
        body = {"prompt": "x", "request_id": "mine"}
        async with session.post("/api/generate", json=body, headers=AUTHORIZED) as response:
            assert (response.status, (await response.json())["error"]["code"]) in {(503, "no_workers")}
        async with session.get("/api/requests/mine", headers=AUTHORIZED) as response:
            (timeline,) = (await response.json())["timelines"]
            assert (timeline["tenant"], timeline["is_open"]) == ("ops", False)
            assert timeline["lines"][0]["text"] == "admit"


async def test_console_with_tls_needs_the_key_and_no_certificate(keys: Path, tmp_path: Path) -> None:
    issue_all(tmp_path / "certs")
    tls = Tls.in_directory(tmp_path / "certs", "frontend")
    registry = ScriptedRegistry()
    registry.workers = (make_worker(model="tandem-demo"),)
    own = {"tls_cert": tls.cert, "tls_key": tls.key, "tls_ca": tls.ca}
    async with (
        play_registry(registry, tls=Tls.in_directory(tmp_path / "certs", "registry")),
        FrontendApp.open(settings(registry, keys, **own)) as app,
        aiohttp.ClientSession(f"https://localhost:{app.console_port}") as session,
    ):
        context = ssl.create_default_context(cafile=str(tls.ca))
        async with session.get("/api/models", ssl=context, headers=AUTHORIZED) as response:
            assert (await response.json())["models"][0]["name"] == "tandem-demo"
        async with session.get("/api/models", ssl=context) as response:
            assert response.status == 401

        first = await serial_number(app.console_port, context)
        issue_all(tmp_path / "certs")
        assert await serial_number(app.console_port, context) != first


async def serial_number(port: int, context: ssl.SSLContext) -> str:
    """Of the certificate that the console presents to a new connection."""
    _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    await writer.wait_closed()
    return str(certificate["serialNumber"])


async def test_console_that_cannot_start_stops_the_frontend_and_names_the_setting(keys: Path, tmp_path: Path) -> None:
    registry = ScriptedRegistry()
    registry.workers = (make_worker(model="tandem-demo"),)
    async with play_registry(registry):
        with pytest.raises(ConfigError, match="console_keys"):
            async with FrontendApp.open(settings(registry, tmp_path / "missing")):
                pass
        async with FrontendApp.open(settings(registry, keys)) as app:
            with pytest.raises(StartError, match="console"):
                async with FrontendApp.open(settings(registry, keys, console_port=app.console_port)):
                    pass


class EndlessFeed:
    """A feed with more to say than any socket holds."""

    def __init__(self) -> None:
        self.viewer_count = 0
        self.has_ended = asyncio.Event()

    async def texts(self) -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "x" * 2**24
        finally:
            self.has_ended.set()


async def test_console_disconnects_a_viewer_that_does_not_read(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WRITE_TIMEOUT_S", 0.2)
    feed = EndlessFeed()
    console = Console(ConsoleKeys(keys), cast("Any", feed), cast("Any", None), None)
    async with console.listening("127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /api/fleet HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        assert b"200" in await reader.readline()
        async with asyncio.timeout(30):
            await feed.has_ended.wait()
        writer.close()


async def test_console_at_its_limit_closes_the_connection_that_waits_longest(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 2)
    console = Console(ConsoleKeys(keys), cast("Any", None), cast("Any", None), None)
    async with console.listening("127.0.0.1", 0) as port, contextlib.AsyncExitStack() as stack:

        async def opened(*, asks: bool) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            if asks:
                writer.write(b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"404" in await reader.readuntil(b"\r\n\r\n")
            return reader

        async def is_closed(reader: asyncio.StreamReader) -> bool:
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(30):
                    await reader.read()
            return True

        page, silent = await opened(asks=True), await opened(asks=False)
        assert await opened(asks=True), "a third one is served"
        assert await is_closed(silent), "one that asked nothing goes first, though it is newer"
        assert not page.at_eof()
        assert await opened(asks=True)
        assert await is_closed(page)


async def opened_at_once(port: int, count: int, context: ssl.SSLContext | None = None) -> list[asyncio.Task[bytes]]:
    """So many connections that say nothing more; each of these ends once the console has closed it."""

    async def one() -> bytes:
        with contextlib.suppress(OSError):
            name = "localhost" if context else None
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
            with contextlib.closing(writer):
                return await reader.read()
        return b""

    return [asyncio.create_task(one()) for _ in range(count)]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["plaintext", "unfinished handshakes", "handshakes"])
def test_console_flooded_with_connections_holds_no_more_than_its_limit_and_serves_an_operator(
    loop: Callable[[], asyncio.AbstractEventLoop],
    kind: str,
    keys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 8)
    # No handshake ends by itself.
    monkeypatch.setattr(connections, "HANDSHAKE_S", 300.0)
    issue_all(tmp_path / "certs")
    tls = None if kind == "plaintext" else Tls.in_directory(tmp_path / "certs", "frontend")
    context = None if tls is None else ssl.create_default_context(cafile=str(tls.ca))

    async def flood() -> None:
        tested = Console(ConsoleKeys(keys), cast("Any", QuietFeed()), cast("Any", None), tls)
        async with tested.listening("127.0.0.1", 0) as port:
            many = await opened_at_once(port, 60, context if kind == "handshakes" else None)
            await assert_eventually(lambda: sum(not one.done() for one in many), lambda left: left == 8, within_s=30)
            url = f"{'https' if tls else 'http'}://localhost:{port}/none"
            async with aiohttp.ClientSession() as session, session.get(url, ssl=context or True) as response:
                assert response.status == 404
            for one in many:
                one.cancel()
            await asyncio.wait(many)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(flood())


class QuietFeed:
    """A feed that says one thing."""

    viewer_count = 0

    async def texts(self) -> AsyncGenerator[str, None]:
        yield "{}"
        await asyncio.Event().wait()


async def test_console_whose_connections_all_have_calls_closes_a_new_one(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 1)
    feed = QuietFeed()
    console = Console(ConsoleKeys(keys), cast("Any", feed), cast("Any", None), None)
    async with console.listening("127.0.0.1", 0) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /api/fleet HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        assert b"200" in await reader.readline()
        late, other = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(30):
                assert await late.read() == b""
        other.close()
        writer.close()


async def test_console_finds_requests_of_other_frontends_and_names_silent_ones(keys: Path) -> None:
    registry = ScriptedRegistry()
    alone = {"console_port": None, "console_keys": None, "frontend_id": "b", "no_worker_wait_s": 0}
    async with (
        play_registry(registry),
        FrontendApp.open(settings(registry, keys, **alone)) as other,
        FrontendApp.open(settings(registry, keys, frontend_id="a")) as app,
        aiohttp.ClientSession(f"http://127.0.0.1:{app.console_port}", headers=AUTHORIZED) as session,
    ):
        listed = {"a": app.address, "b": other.address, "gone": "127.0.0.1:1"}
        registry.frontends = tuple(
            Frontend(frontend_id=name, epoch=1, address=address, model="tandem-demo")
            for name, address in listed.items()
        )
        registry.frontends_changed.set()
        with pytest.raises(TandemError):
            async for _ in calls.generate(other.address, pb.GenerateRequest(prompt="x", request_id="theirs")):
                pass

        async def found() -> dict[str, Any]:
            async with session.get("/api/requests") as response:
                answer: dict[str, Any] = await response.json()
                return answer

        answer = await assert_eventually(found, lambda answer: answer["silent"] == ["gone"])
        assert [(row["id"], row["frontend"], row["outcome"]) for row in answer["requests"]] == [
            ("theirs", "b", "refused")
        ]
        async with session.get("/api/requests/theirs") as response:
            (timeline,) = (await response.json())["timelines"]
            assert (timeline["frontend"], timeline["ending"]) == ("b", "refused: NO_WORKERS")
        async with session.get("/api/requests/unknown") as response:
            assert "gone did not respond" in (await response.json())["error"]["message"]
        async with session.get("/api/fleet") as response:
            stream = events(response)
            while (rows := (await anext(stream))["frontends"])[1]["open_requests"] is None:
                pass
            assert [row["id"] for row in rows] == ["a", "b", "gone"]
