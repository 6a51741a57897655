"""The endpoint that Prometheus scrapes: a small HTTP server in its own threads, beside the event loop.

Owns the listener and its limits. A scrape uses the event loop only to read the gauges; the text is encoded in a thread.
With TLS it requires a client certificate, like every port of a process; the files are read per connection, so that a
renewed certificate needs no restart.
"""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tandem.domain.network_address import bare_host, join_address
from tandem.errors import StartError
from tandem.observability.merged_scrape import LocalScrapes, merged
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
CONNECTIONS_MAX = 8
"""Prometheus uses one. Concurrent connections beyond this are closed without a response."""
TIMEOUT_S = 5.0
"""Time limit for a client to send its request, and to read the response."""
POLL_S = 0.2
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Others:
    """Processes whose metrics are merged with those of this one."""

    scrapes: LocalScrapes
    own_label: str
    """Label value of this process."""


class ScrapeServer:
    """The scrape endpoint of one process; see the module."""

    def __init__(
        self,
        registry: CollectorRegistry,
        pages: Mapping[str, Callable[[], bytes]],
        tls: Tls | None,
        others: Others | None = None,
    ) -> None:
        """`pages`: additional pages, by path."""
        self._registry = registry
        self._pages = pages
        self._tls = tls
        self._others = others
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The bound port; 0 for a Unix socket."""
        assert self._server is not None, "port before bind()"
        address = self._server.server_address
        return int(address[1]) if isinstance(address, tuple) else 0

    def bind(self, host: str, port: int) -> None:
        """Listen on a TCP port; 0: any free port.

        Raises:
            StartError: the port cannot be bound.
        """
        try:
            self._server = _Server((bare_host(host), port), self._page, self._tls)
        except OSError as problem:
            raise StartError(
                f"cannot listen for metrics on {join_address(host, port)}: {problem.strerror or problem}"
            ) from None

    def bind_local(self, path: Path) -> None:
        """Listen on a Unix socket instead, without TLS: file permissions of the directory protect it.

        Raises:
            StartError: the socket cannot be bound.
        """
        path.unlink(missing_ok=True)
        try:
            self._server = _LocalServer(str(path), self._page, None)
        except OSError as problem:
            raise StartError(f"cannot listen for metrics at {path}: {problem.strerror or problem}") from None

    def serve(self) -> None:
        """Start serving."""
        assert self._server is not None, "serve() before bind()"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="scrape", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving. Blocks for up to `POLL_S`; idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._thread is not None:
            server.shutdown()
            self._thread.join()
        server.server_close()

    def _page(self, path: str, accept: str) -> tuple[str, bytes] | None:
        """Content type and body of a page; None: not found."""
        if path == METRICS_PATH:
            encode, content_type = choose_encoder(accept)
            body = encode(self._registry)
            if self._others is not None:
                own = {self._others.own_label: body.decode()}
                body = merged({**self._others.scrapes.texts(accept), **own}).encode()
            return content_type, body
        page = self._pages.get(path)
        return None if page is None else (TEXT, page())


PageHandler = Callable[[str, str], tuple[str, bytes] | None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # The exit of a process must not wait for a slow client.
    block_on_close = False

    def __init__(self, address: tuple[str, int] | str, page: PageHandler, tls: Tls | None) -> None:
        self.page = page
        self._tls = tls
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self.address_family = self._family(address)
        super().__init__(address, _Handler)  # type: ignore[arg-type]  # the stubs know of no paths

    def _family(self, address: tuple[str, int] | str) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in address[0] else socket.AF_INET

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(TIMEOUT_S)
            super().process_request_thread(self._secured(request), client_address)
        except (OSError, ssl.SSLError) as problem:
            log.debug("scrape failed: %s", problem)
            self.shutdown_request(request)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect or do not speak HTTP; log anything else, which is a defect."""
        problem = sys.exc_info()[1]
        if not isinstance(problem, OSError):
            log.error(
                "bug in this process while it answered a scrape: the scrape fails, requests are not affected",
                exc_info=problem,
            )

    def _secured(self, request: socket.socket) -> socket.socket:
        if self._tls is None:
            return request
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self._tls.ca))
        context.load_cert_chain(self._tls.cert, self._tls.key)
        context.verify_mode = ssl.CERT_REQUIRED
        return context.wrap_socket(request, server_side=True)


class _LocalServer(_Server):
    def _family(self, address: tuple[str, int] | str) -> socket.AddressFamily:
        return socket.AF_UNIX

    def server_bind(self) -> None:
        """Skip HTTPServer's host name lookup, which fails for a path."""
        TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "tandem"
    sys_version = ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        try:
            page = self.server.page(self.path.partition("?")[0], self.headers.get("Accept", ""))
        except OSError as problem:
            # A page that proxies another process (Envoy's statistics) cannot reach it.
            return self._send(503, TEXT, f"{problem}\n".encode())
        if page is None:
            return self._send(404, TEXT, f"see {METRICS_PATH}\n".encode())
        return self._send(200, *page)

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the library's name for it
        """Scrapes are not logged: they arrive every few seconds."""
