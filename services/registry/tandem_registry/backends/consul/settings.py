"""Address of a Consul agent, and the credentials presented to it.

Owns the formats of address, token and certificates, checked once at start. Tokens are never logged.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tandem.errors import ConfigError

DEFAULT_PORTS = {"http": 8500, "https": 8501}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsulSettings:
    """One agent and one service name."""

    address: str = "127.0.0.1:8500"
    """host:port, or a URL of http or https."""
    service: str = "tandem"
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    has_checks: bool = True
    """Whether the agent checks the health of members."""

    def endpoint(self) -> tuple[str, str, int]:
        """Scheme, host and port.

        Raises:
            ConfigError: names consul_address.
        """
        url = self.address if "://" in self.address else f"http://{self.address}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as problem:
            raise ConfigError("consul_address", f"is malformed: {problem}") from None
        is_bare = parts.path in ("", "/") and not parts.query and not parts.fragment
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or not is_bare or parts.username is not None:
            raise ConfigError("consul_address", "must be host:port, http://host:port or https://host:port")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return parts.scheme, host, DEFAULT_PORTS[parts.scheme] if port is None else port

    def read_token(self) -> str:
        """The current token, from its file if there is one; empty: none.

        Raises:
            ConfigError: its file is unreadable, or it is not a valid token; names consul_token_file or consul_token.
        """
        if self.token_file is None:
            if self.token and not _is_token(self.token):
                raise ConfigError("consul_token", "must be printable ASCII without spaces")
            return self.token
        try:
            token = self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as problem:
            raise ConfigError("consul_token_file", f"{self.token_file} cannot be read: {_reason(problem)}") from None
        if not _is_token(token):
            raise ConfigError("consul_token_file", f"{self.token_file} must contain printable ASCII without spaces")
        return token

    def tls_context(self) -> ssl.SSLContext | None:
        """Client certificate and trusted CAs for HTTPS; None: plaintext.

        Raises:
            ConfigError: a file is invalid; names its setting.
        """
        if self.endpoint()[0] == "http":
            return None
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        except OSError as problem:
            raise ConfigError("consul_ca", f"{self.ca} cannot be used: {_reason(problem)}") from None
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key)
            except OSError as problem:
                pair = f"{self.cert} with {self.key}"
                raise ConfigError("consul_cert", f"{pair} cannot be used: {_reason(problem)}") from None
        return context


def _reason(problem: Exception) -> str:
    return str(getattr(problem, "strerror", None) or problem)


def _is_token(token: str) -> bool:
    return bool(token) and token.isascii() and token.isprintable() and " " not in token
