"""HTTP to an agent of Consul: py-consul's asyncio client on a session of ours.

Owns connections (few: an agent takes 200 of one address), bounds of time, the token, and the meaning of failures. What
is asked is `client`.
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
"""One waits for changes; the others write."""
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
"""For an answer that Consul does not delay on purpose."""
READ_BUFFER_BYTES = 2**22
"""So much of an answer is taken without a pause; aiohttp's own 64 KiB are many for megabytes."""
SHOWN_CHARACTERS = 200
TOO_MANY = 429
TOKEN_SETTING = "consul_token"  # noqa: S105 -- the name of a setting


def is_refusal(error: ServiceError) -> bool:
    """Whether Consul does not let this registry do that: its token is unknown, or may not."""
    return error.metadata.get("setting") == TOKEN_SETTING


class Session(base.HTTPClient):  # type: ignore[misc]  # py-consul has no types
    """The adapter that py-consul calls, in place of its own, which bounds no answer and keeps no connection limit."""

    def __init__(self, settings: ConsulSettings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tls = settings.tls_context()
        connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=True if tls is None else tls)
        self._session = aiohttp.ClientSession(
            connector=connector,
            trust_env=False,
            # The agent is near: to compress an answer takes it longer than to send it.
            headers={"Accept-Encoding": "identity"},
            read_bufsize=READ_BUFFER_BYTES,
        )
        self._where = settings.address
        self.timeout_s = ANSWER_TIMEOUT_S

    async def send(
        self,
        callback: Callable[[base.Response], Any],
        method: str,
        path: str,
        params: list[tuple[str, Any]] | None = None,
        *,
        data: str | bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Any:
        """One request.

        Raises:
            ServiceError: there is no answer, or one that says that Consul cannot, or that this registry may not
                (`is_refusal`).
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self.uri(path, params), headers=headers, data=data, timeout=timeout, allow_redirects=False
            ) as answer:
                body = await answer.read()
        except TimeoutError:
            raise ServiceError(f"Consul at {self._where} does not answer") from None
        except (aiohttp.ClientError, OSError) as problem:
            raise ServiceError(f"Consul at {self._where} cannot be reached: {_words(problem)}") from None
        self._check(answer.status, body)
        return callback(base.Response(answer.status, answer.headers, body))

    def _check(self, status: int, body: bytes) -> None:
        words = body[:SHOWN_CHARACTERS].decode(errors="replace").strip()
        if status in (401, 403):
            sentence = f"Consul at {self._where} refuses the token of this registry (consul_token): {words}"
            raise ServiceError(sentence, setting=TOKEN_SETTING)
        if status >= 500 or status == TOO_MANY:
            raise ServiceError(f"Consul at {self._where} cannot: {words or status}")
        if status >= 300 and status != 404:
            raise ServiceError(f"Consul at {self._where} answers {status}: {words}")

    def get(self, callback: Any, path: str, params: Any = None, headers: Any = None, raw: bool = False) -> Any:
        """As py-consul's parts call it."""
        return self.send(callback, "GET", path, params, headers=headers)

    def put(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        """As py-consul's parts call it."""
        return self.send(callback, "PUT", path, params, data=data, headers=headers)

    def delete(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        """As py-consul's parts call it."""
        return self.send(callback, "DELETE", path, params, data=data, headers=headers)

    def post(self, callback: Any, path: str, params: Any = None, data: Any = "", headers: Any = None) -> Any:
        """As py-consul's parts call it."""
        return self.send(callback, "POST", path, params, data=data, headers=headers)

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()
        # The event loop closes TLS connections in its next turns; the session does not wait for it.
        await asyncio.sleep(0)


class TandemConsul(Consul):  # type: ignore[misc]
    """py-consul's client over that session."""

    def __init__(self, settings: ConsulSettings) -> None:
        self._settings = settings
        scheme, host, port = settings.place()
        super().__init__(host=host, port=port, scheme=scheme)
        self.token = settings.read_token()

    def http_connect(self, host: str, port: int, scheme: str, verify: Any = True, cert: Any = None) -> Session:
        """The session to that agent."""
        return Session(self._settings, host, port, scheme)

    def read_token_again(self) -> bool:
        """Take a token that was renewed in its file; returns whether it is another one."""
        try:
            token = self._settings.read_token()
        except ConfigError:
            return False
        is_new = token != self.token
        self.token = token
        return is_new


def _words(problem: Exception) -> str:
    return str(problem) or type(problem).__name__
