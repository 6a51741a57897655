"""A question to a Consul agent over HTTP: one at a time, answered whole.

For whoever starts an agent or wants to know whether one is there. Membership is the registry's, which has a client of
its own. Tokens are sent, never shown.
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
REFUSALS = {401: "wants a token", 403: "refuses the token", 500: "has no leader", 503: "has no leader"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsulAccess:
    """An agent, and what it is shown."""

    address: str
    """host:port, or a URL."""
    token: str = field(default="", repr=False)
    ca: Path | None = None
    """CAs of the agent's certificate; None: those of this machine."""
    tls: Tls | None = None
    """What this process proves itself with; None: the agent asks for nothing."""

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.address.rstrip("/") if "://" in self.address else f"http://{self.address}"

    async def get(self, path: str, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer to a question, from JSON.

        Raises:
            StartError: there is none; says why.
        """
        return await self.send("GET", path, timeout_s=timeout_s)

    async def put(self, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> Any:
        """Change something. Raises as `get`."""
        return await self.send("PUT", path, body, timeout_s)

    async def send(self, method: str, path: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> Any:
        """Any request. Raises as `get`."""
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
                words = problem.read(200).decode(errors="replace").strip()
            meaning = REFUSALS.get(problem.code, "answers")
            raise StartError(f"Consul at {self.address} {meaning} ({problem.code}: {words})") from None
        except urllib.error.URLError as problem:
            raise StartError(f"Consul at {self.address} does not answer: {_words(problem.reason)}") from None
        except TimeoutError:
            raise StartError(f"Consul at {self.address} does not answer within {timeout_s:g} s") from None
        except (OSError, ValueError) as problem:
            raise StartError(f"{self.address} does not answer as Consul does: {_words(problem)}") from None

    def _context(self) -> ssl.SSLContext | None:
        if not self.url.startswith("https://"):
            return None
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            if self.tls is not None:
                context.load_cert_chain(self.tls.cert, self.tls.key)
        except OSError as problem:
            files = [str(self.ca), *([] if self.tls is None else [str(self.tls.cert), str(self.tls.key)])]
            raise StartError(f"{', '.join(files)}: cannot be used for TLS: {_words(problem)}") from None
        return context


def read_token_file(file: Path) -> str:
    """The token that a file holds.

    Raises:
        StartError: it cannot be read, or holds none.
    """
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise StartError(f"{file} cannot be read: {_words(problem)}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise StartError(f"{file} holds no token: one word is expected in it")
    return token


def _words(problem: object) -> str:
    if isinstance(problem, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({problem.verify_message})"
    return str(getattr(problem, "strerror", None) or problem)
