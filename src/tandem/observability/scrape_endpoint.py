"""The endpoint that Prometheus scrapes: one small HTTP server in threads of its own, beside the event loop.

Owns the listener and its bounds. A scrape costs the event loop what reading its gauges costs, and nothing for the
text. With TLS it asks for a certificate, as every port of a process does; the files are read at each connection, so
that a new certificate needs no restart.
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

from tandem.errors import StartError
from tandem.observability.merged_scrape import LocalScrapes, merged
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
CONNECTIONS_MAX = 8
"""Prometheus has one. More than this at once are closed without an answer."""
TIMEOUT_S = 5.0
"""Most time for a client to send its request, or to take the answer."""
POLL_S = 0.2
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Others:
    """Processes whose metrics are told together with this one's."""

    scrapes: LocalScrapes
    own_label: str
    """What this process is called beside them."""


class ScrapeServer:
    """See the module."""

    def __init__(
        self,
        registry: CollectorRegistry,
        pages: Mapping[str, Callable[[], bytes]],
        tls: Tls | None,
        others: Others | None = None,
    ) -> None:
        """`pages` are answered by their path besides the metrics."""
        self._registry = registry
        self._pages = pages
        self._tls = tls
        self._others = others
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The one in use, once bound; 0 at a path."""
        assert self._server is not None, "port before bind()"
        address = self._server.server_address
        return int(address[1]) if isinstance(address, tuple) else 0

    def bind(self, host: str, port: int) -> None:
        """Take the port; 0: the OS chooses.

        Raises:
            StartError: it cannot be listened on.
        """
        try:
            self._server = _Server((host.strip("[]"), port), self._answer, self._tls)
        except OSError as problem:
            raise StartError(f"cannot listen for metrics on {host}:{port}: {problem.strerror or problem}") from None

    def bind_local(self, path: Path) -> None:
        """Take a path instead, in a directory that only processes of ours can enter: it asks for no certificate.

        Raises:
            StartError: it cannot be listened on.
        """
        path.unlink(missing_ok=True)
        try:
            self._server = _LocalServer(str(path), self._answer, None)
        except OSError as problem:
            raise StartError(f"cannot listen for metrics at {path}: {problem.strerror or problem}") from None

    def serve(self) -> None:
        """Answer from now on."""
        assert self._server is not None, "serve() before bind()"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="scrape", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more. Blocks for a moment; may be called twice."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._thread is not None:
            server.shutdown()
            self._thread.join()
        server.server_close()

    def _answer(self, path: str, accept: str) -> tuple[str, bytes] | None:
        """Content type and body; None: nothing is there."""
        if path == METRICS_PATH:
            encode, content_type = choose_encoder(accept)
            body = encode(self._registry)
            if self._others is not None:
                own = {self._others.own_label: body.decode()}
                body = merged({**self._others.scrapes.texts(accept), **own}).encode()
            return content_type, body
        page = self._pages.get(path)
        return None if page is None else (TEXT, page())


Answer = Callable[[str, str], tuple[str, bytes] | None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # The end of a process does not wait for whoever reads slowly.
    block_on_close = False

    def __init__(self, address: tuple[str, int] | str, answer: Answer, tls: Tls | None) -> None:
        self.answer = answer
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
            log.debug("a scrape has failed: %s", problem)
            self.shutdown_request(request)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever scrapes has left, or sends no HTTP: nothing. Anything else is a defect."""
        problem = sys.exc_info()[1]
        if not isinstance(problem, OSError):
            log.error("a scrape has failed", exc_info=problem)

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
        """Without a look-up of the host's name, which a path has not."""
        TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "tandem"
    sys_version = ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        try:
            answer = self.server.answer(self.path.partition("?")[0], self.headers.get("Accept", ""))
        except OSError as problem:
            # Whatever a page asks for its text is away.
            return self._send(503, TEXT, f"{problem}\n".encode())
        if answer is None:
            return self._send(404, TEXT, f"see {METRICS_PATH}\n".encode())
        return self._send(200, *answer)

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the library's name for it
        """A scrape is no event."""
