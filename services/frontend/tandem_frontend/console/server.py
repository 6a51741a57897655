"""The console's HTTP listener: files of the page, the fleet as server-sent events, requests, and the playground.

Owns the listener and its limits. It runs on the frontend's event loop; the paths of the data begin with /api/ and
require a key. The playground calls this frontend as any client does, as the tenant of its key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from aiohttp import web
from google.protobuf.json_format import ParseDict, ParseError

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.client import admin_calls, calls
from tandem.domain.http_errors import ERROR_BY_CODE
from tandem.domain.limits import REQUEST_ID_CHARS_MAX
from tandem.domain.network_address import bare_host, join_address
from tandem.domain.quota import client_header
from tandem.errors import InvalidRequest, RequestNotFound, StartError, TandemError
from tandem.service.api_keys import ApiKey
from tandem.tls.paths import Tls
from tandem_frontend.console.access import ConsoleKeys, is_own_page
from tandem_frontend.console.connections import Connections
from tandem_frontend.console.feed import FleetFeed
from tandem_frontend.console.frontends import ConsoleFrontends
from tandem_frontend.console.pages import HEADERS, read_pages
from tandem_frontend.console.rows import summary_row, timeline_row
from tandem_frontend.response.error_body import error_body, last_event

VIEWERS_MAX = 16
"""Open streams of the fleet."""
BODY_BYTES_MAX = 2**16
LISTED_MAX = 200
"""Requests of one page of the request list."""
WRITE_TIMEOUT_S = 10.0
"""A viewer that does not read for so long is disconnected."""
STOP_GRACE_S = 0.2
KEEP_ALIVE_S = 60.0
"""Of a connection without a call: the library keeps it for an hour."""
EVENT_STREAM = "text/event-stream; charset=utf-8"
KEY = web.RequestKey("key", ApiKey)
"""The key of a call, once it was checked."""
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Console:
    """The console of one frontend."""

    def __init__(self, keys: ConsoleKeys, feed: FleetFeed, frontends: ConsoleFrontends, tls: Tls | None) -> None:
        """`tls`: of the listener, and the certificate with which frontends are called; None: plaintext."""
        self._keys = keys
        self._feed = feed
        self._frontends = frontends
        self._tls = tls
        self._pages = read_pages()
        self._connections: Connections | None = None

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[int]:
        """Serve while the context is open; yields the port.

        Raises:
            StartError: the port cannot be bound, or a file of `tls` is unusable.
        """
        app = web.Application(middlewares=[self._guard], client_max_size=BODY_BYTES_MAX)
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/api/fleet", self._fleet)
        app.router.add_get("/api/requests", self._requests)
        app.router.add_get("/api/requests/{id}", self._timelines)
        app.router.add_get("/api/models", self._models)
        app.router.add_post("/api/generate", self._generate)
        app.router.add_get("/{path:.*}", self._page)
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=KEEP_ALIVE_S,
            shutdown_timeout=STOP_GRACE_S,
        )
        async with AsyncExitStack() as stack:
            await runner.setup()
            assert runner.server is not None, "the runner is set up"
            stack.push_async_callback(runner.cleanup)
            try:
                self._connections = Connections(runner.server, _server_context(self._tls) if self._tls else None)
                sockets = await _listen(host, port, stack)
            except (OSError, ssl.SSLError) as problem:
                where = join_address(host, port)
                raise StartError(f"cannot serve the console on {where}: {problem.strerror or problem}") from None
            stack.push_async_callback(self._connections.close)
            self._connections.serve(sockets)
            yield sockets[0].getsockname()[1]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse calls without a key or from another site's page, and turn errors into error objects."""
        assert self._connections is not None, "a call has a listener"
        with self._connections.calling(request.protocol):
            return await self._guarded(request, handler)

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path.startswith("/api/"):
                if not is_own_page(request.headers, request.host):
                    return _refused(403, "only the console's own page may call it", "forbidden_origin")
                key = self._keys.find(request.headers.get("Authorization", ""))
                if key is None:
                    return _refused(401, "the key is missing or wrong", "invalid_api_key")
                request[KEY] = key
            return await handler(request)
        except TandemError as problem:
            return _as_response(problem)
        except web.HTTPException as problem:
            # A body that is too large, or a method that no page has.
            if problem.status < 400:
                raise
            return _refused(problem.status, problem.reason, "invalid_request")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        page = self._pages.get(request.path)
        if page is None:
            return _refused(404, "not found", "not_found")
        headers = {"ETag": page.etag, "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == page.etag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=page.body, headers={**headers, "Content-Type": page.content_type})

    async def _fleet(self, request: web.Request) -> web.StreamResponse:
        if self._feed.viewer_count >= VIEWERS_MAX:
            return _refused(503, f"{VIEWERS_MAX} viewers are connected already", "too_many_viewers")
        response = await _begin_events(request)
        async with contextlib.aclosing(self._feed.texts()) as texts:
            async for text in texts:
                # A key that has been revoked shows nothing more.
                if self._keys.find(request.headers["Authorization"]) is None:
                    break
                await _write(request, response, f"data: {text}\n\n".encode())
        return response

    async def _requests(self, request: web.Request) -> web.StreamResponse:
        """The newest requests of all frontends."""
        wanted = admin_pb.ListRequestsRequest(page_size=LISTED_MAX)
        found, silent = await self._frontends.ask(partial(admin_calls.list_requests, request=wanted, tls=self._tls))
        rows = [summary_row(name, summary) for name, response in found for summary in response.requests]
        rows.sort(key=lambda row: row["begin_s"], reverse=True)
        return _json({"requests": rows[:LISTED_MAX], "silent": silent})

    async def _timelines(self, request: web.Request) -> web.StreamResponse:
        """The timelines of a request id, or of an x-request-id."""
        wanted = request.match_info["id"]
        if len(wanted) > REQUEST_ID_CHARS_MAX:
            raise InvalidRequest("request_id", f"must be 1 to {REQUEST_ID_CHARS_MAX} characters long")
        ask = partial(admin_calls.request_timelines, request_id=wanted, tls=self._tls)
        found, silent = await self._frontends.ask(ask)
        rows = [timeline_row(name, timeline) for name, timelines in found for timeline in timelines]
        if not rows:
            where = f"; {', '.join(silent)} did not respond" if silent else ""
            raise RequestNotFound(
                f"no frontend has this request: each keeps its last finished ones only{where}", request_id=wanted
            )
        rows.sort(key=lambda row: row["begin_s"])
        return _json({"timelines": rows, "silent": silent})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        models = await calls.list_models(self._frontends.own.address, tls=self._tls)
        return _json(
            {
                "models": [
                    {
                        "name": model.name,
                        "context_tokens_max": model.context_tokens_max,
                        "has_chat_template": model.has_chat_template,
                    }
                    for model in models
                    if model.state != pb.MODEL_STATE_REFUSED
                ]
            }
        )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        """A generation as the events of `POST /v1/generate`."""
        wanted = _parsed(await request.read(), request.content_type)
        key = request[KEY]
        client = client_header(key.client_id, key.quota)
        events = calls.generate_events(self._frontends.own.address, wanted, client, tls=self._tls)
        response: web.StreamResponse | None = None
        async with contextlib.aclosing(events):
            try:
                async for data in events:
                    # Begun with the first event, so that a refusal has a status of its own.
                    response = response or await _begin_events(request)
                    await _write(request, response, data)
            except TandemError as problem:
                if response is None:
                    raise
                await _write(request, response, f"data: {json.dumps(last_event(problem))}\n\n".encode())
        return response or await _begin_events(request)


def _parsed(body: bytes, content_type: str) -> pb.GenerateRequest:
    if content_type != "application/json":
        raise InvalidRequest("content-type", "must be application/json")
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise InvalidRequest("body", "must be a JSON object")
        return ParseDict(fields, pb.GenerateRequest())
    except (ValueError, ParseError, RecursionError) as problem:
        raise InvalidRequest("body", f"is not a GenerateRequest in JSON: {problem}") from None


async def _begin_events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": EVENT_STREAM, "Cache-Control": "no-store"})
    await response.prepare(request)
    return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(data)
    except TimeoutError:
        # What waits to be sent would keep the connection open.
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(f"the viewer read nothing for {WRITE_TIMEOUT_S:g} s") from None


def _json(value: dict[str, Any], status: int = 200) -> web.Response:
    return web.json_response(value, status=status, headers={"Cache-Control": "no-store"})


def _refused(status: int, message: str, code: str) -> web.Response:
    return _json({"error": {"message": message, "type": ERROR_TYPES.get(status, "api_error"), "code": code}}, status)


def _as_response(problem: TandemError) -> web.Response:
    return _json(error_body(problem), ERROR_BY_CODE[problem.code].status)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


async def _listen(host: str, port: int, stack: AsyncExitStack) -> list[socket.socket]:
    """A listening socket for each address of the host; the stack closes them."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets = list[socket.socket]()
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        one = stack.enter_context(socket.create_server(address, family=family))
        one.setblocking(False)
        sockets.append(one)
    return sockets


def _server_context(tls: Tls) -> ssl.SSLContext:
    """TLS of the listener. A browser needs no certificate: the key is its proof. Renewed files count from the next
    connection on.
    """

    def read() -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls.cert, tls.key)
        return context

    def renew(connection: ssl.SSLObject, name: str | None, used: ssl.SSLContext) -> None:
        # Files that are being replaced do not fit together: the last ones that did stay in use.
        with contextlib.suppress(OSError, ssl.SSLError):
            connection.context = read()

    context = read()
    context.sni_callback = renew
    return context
