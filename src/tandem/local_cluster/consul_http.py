"""Single HTTP requests to a Consul agent.

For code that starts an agent or checks that one is reachable. The registry has its own client for membership. Tokens
are never logged.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.errors import StartError
from tandem.tls.paths import Tls

TIMEOUT_S = 3.0
ERRORS = {401: "requires a token", 403: "rejected the token", 500: "has no leader", 503: "has no leader"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsulAccess:
    """Address of an agent, and the credentials presented to it."""

    address: str
    """host:port, or a URL."""
    token: str = field(default="", repr=False)
    ca: Path | None = None
    """CAs that sign the agent's certificate; None: those of this machine."""
    tls: Tls | None = None
    """Client certificate; None: the agent requires none."""

    @property
    def url(self) -> str:
        """Its base URL."""
        return self.address.rstrip("/") if "://" in self.address else f"http://{self.address}"

    async def get(self, path: str, timeout_s: float = TIMEOUT_S) -> Any:
        """GET a path; returns the decoded JSON of the response.

        Raises:
            StartError: no response, or an error status; the message says why.
        """
        return await self.send("GET", path, timeout_s=timeout_s)

    async def put(self, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> Any:
        """PUT a JSON body. Raises as `get`."""
        return await self.send("PUT", path, body, timeout_s)

    async def send(self, method: str, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> Any:
        """Send any request. Raises as `get`."""
        return await asyncio.to_thread(self._send, method, path, body, timeout_s)

    def _send(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        if not self.url.startswith(("http://", "https://")):
            raise StartError(f"{self.address} is neither host:port nor an http or https URL")
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)  # noqa: S310 checked above
        if self.token:
            request.add_unredirected_header("X-Consul-Token", self.token)
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._context())]
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
                content = response.read()
            return json.loads(content) if content.strip() else None
        except urllib.error.HTTPError as problem:
            with problem:
                body = problem.read(200).decode(errors="replace").strip()
            meaning = ERRORS.get(problem.code, "responded with an error")
            raise StartError(f"Consul at {self.address} {meaning} ({problem.code}: {body})") from None
        except urllib.error.URLError as problem:
            raise StartError(f"Consul at {self.address} is unreachable: {_reason(problem.reason)}") from None
        except TimeoutError:
            raise StartError(f"Consul at {self.address} did not respond within {timeout_s:g} s") from None
        except (OSError, ValueError) as problem:
            raise StartError(f"no valid response from Consul at {self.address}: {_reason(problem)}") from None

    def _context(self) -> ssl.SSLContext | None:
        if not self.url.startswith("https://"):
            return None
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            if self.tls is not None:
                context.load_cert_chain(self.tls.cert, self.tls.key)
        except OSError as problem:
            files = [str(self.ca), *([] if self.tls is None else [str(self.tls.cert), str(self.tls.key)])]
            raise StartError(f"{', '.join(files)}: cannot be used for TLS: {_reason(problem)}") from None
        return context


def read_token_file(file: Path) -> str:
    """The token in a file.

    Raises:
        StartError: the file cannot be read, or contains no valid token.
    """
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise StartError(f"{file} cannot be read: {_reason(problem)}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise StartError(f"{file} contains no valid token: expected printable ASCII without spaces")
    return token


def _reason(problem: object) -> str:
    if isinstance(problem, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({problem.verify_message})"
    return str(getattr(problem, "strerror", None) or problem)
