"""HTTP to a Consul agent: py-consul's asyncio client on an aiohttp session with limits.

Owns connections (few: an agent accepts 200 per client address), timeouts, the token, and the mapping of failures. The
requests are in `client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
from consul import base
from consul.aio import Consul

from tandem.errors import ConfigError, ServiceError
from tandem_registry.backends.consul.settings import ConsulSettings

CONNECTIONS_MAX = 8
"""One is in a blocking query; the others write."""
CONNECT_TIMEOUT_S = 2.0
RESPONSE_TIMEOUT_S = 5.0
"""For a response that Consul does not delay on purpose."""
READ_BUFFER_BYTES = 2**22
"""Responses have megabytes: aiohttp's default of 64 KiB would pause reading dozens of times."""
SHOWN_CHARACTERS = 200
TOO_MANY = 429
TOKEN_SETTING = "consul_token"  # noqa: S105 -- the name of a setting


def is_refusal(error: ServiceError) -> bool:
    """Whether Consul rejected the request because of this registry's token."""
    return error.metadata.get("setting") == TOKEN_SETTING


class Session(base.HTTPClient):  # type: ignore[misc]  # py-consul has no types
    """py-consul's HTTP adapter, in place of its own, which has neither timeouts nor a connection limit."""

    def __init__(self, settings: ConsulSettings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tls = settings.tls_context()
        connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=True if tls is None else tls)
        self._session = aiohttp.ClientSession(
            connector=connector,
            trust_env=False,
            # The agent is on this machine or near: compressing a response takes longer than sending it.
            headers={"Accept-Encoding": "identity"},
            read_bufsize=READ_BUFFER_BYTES,
        )
        self._where = settings.address
        self.timeout_s = RESPONSE_TIMEOUT_S

    async def send(
        self,
        callback: Callable[[base.Response], Any],
        method: str,
        path: str,
        params: list[tuple[str, Any]] | None = None,
        *,
        data: str | bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = RESPONSE_TIMEOUT_S,
    ) -> Any:
        """Send one request; `timeout_s` bounds it as a whole.

        Raises:
            ServiceError: no response in time, an error status, or a rejected token (`is_refusal`).
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self.uri(path, params), headers=headers, data=data, timeout=timeout, allow_redirects=False
            ) as response:
                body = await response.read()
        except TimeoutError:
            raise ServiceError(f"Consul at {self._where} did not respond within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as problem:
            raise ServiceError(f"Consul at {self._where} is unreachable: {_text(problem)}") from None
        self._check(response.status, body)
        return callback(base.Response(response.status, response.headers, body))

    def _check(self, status: int, body: bytes) -> None:
        text = body[:SHOWN_CHARACTERS].decode(errors="replace").strip()
        if status in (401, 403):
            problem = f"Consul at {self._where} rejected this registry's token (consul_token): {text}"
            raise ServiceError(problem, setting=TOKEN_SETTING)
        if status >= 500 or status == TOO_MANY:
            raise ServiceError(f"Consul at {self._where} failed with status {status}: {text}")
        if status >= 300 and status != 404:
            raise ServiceError(f"Consul at {self._where} responded with unexpected status {status}: {text}")

    def get(self, callback: Any, path: str, params: Any = None, headers: Any = None, raw: bool = False) -> Any:
        """Called by py-consul."""
        return self.send(callback, "GET", path, params, headers=headers)

    def put(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        """Called by py-consul."""
        return self.send(callback, "PUT", path, params, data=data, headers=headers)

    def delete(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        """Called by py-consul."""
        return self.send(callback, "DELETE", path, params, data=data, headers=headers)

    def post(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        """Called by py-consul."""
        return self.send(callback, "POST", path, params, data=data, headers=headers)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
        # aiohttp does not wait until TLS connections are closed; the event loop closes them in its next iteration.
        await asyncio.sleep(0)


class TandemConsul(Consul):  # type: ignore[misc]
    """py-consul's client on `Session`."""

    def __init__(self, settings: ConsulSettings) -> None:
        self._settings = settings
        scheme, host, port = settings.endpoint()
        super().__init__(host=host, port=port, scheme=scheme)
        self.token = settings.read_token()

    def http_connect(self, host: str, port: int, scheme: str, verify: Any = True, cert: Any = None) -> Session:
        """The session for that agent; called by py-consul."""
        return Session(self._settings, host, port, scheme)

    def reload_token(self) -> bool:
        """Read the token file again; returns whether the token has changed."""
        try:
            token = self._settings.read_token()
        except ConfigError:
            return False
        is_new = token != self.token
        self.token = token
        return is_new


def _text(problem: Exception) -> str:
    return str(problem) or type(problem).__name__
