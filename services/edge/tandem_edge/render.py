"""Renders Envoy's configuration from the settings. Pure: reads only the templates, writes nothing.

Every value that a template prints goes through `quoted`, so that a value can never become YAML structure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from google.rpc import code_pb2
from markupsafe import Markup

import tandem
from tandem.domain import http_errors
from tandem.domain.network_address import split_address
from tandem.domain.quota import QUOTA_HEADERS
from tandem.service.api_keys import ApiKey
from tandem_edge import transcoding
from tandem_edge.config import EdgeConfig, is_ip
from tandem_edge.endpoints import Endpoint, assignment
from tandem_edge.keys import key_filter

PARTS = files("tandem_edge").joinpath("envoy")
TEMPLATE = "edge.yaml.jinja"
SECRET_TEMPLATE = "tls_secret.yaml.jinja"  # noqa: S105 -- the name of a file
ERRORS_TEMPLATE = "errors.lua.jinja"
ERRORS_LUA = "errors.lua"
REQUESTS_TEMPLATE = "requests.lua.jinja"
REQUESTS_LUA = "requests.lua"
STAINLESS = (
    *("arch", "async", "custom-poll-interval", "helper-method", "lang", "os", "package-version", "poll-helper"),
    *("read-timeout", "retry-count", "runtime", "runtime-version", "timeout"),
)
"""Headers with which the SDKs of OpenAI and Anthropic describe themselves."""
OTLP_PORT = 4317
"""Default port of a collector address without one."""
FRONTEND_NAME = "frontend"
"""DNS name in every frontend certificate that `tandem certs` issues."""

PATHS = {
    "health": "/healthz",
    # What load balancers, benchmarks and other servers' clients call it.
    "health_names": ("/healthz", "/health", "/ping", "/ready", "/readyz", "/v1/health"),
    "version": "/version",
    "metrics": "/metrics",
    "cors_headers": (
        "authorization",
        "content-type",
        *("x-request-id", "x-api-key", "x-session-id", "idempotency-key", "traceparent", "tracestate"),
        *(f"openai-{name}" for name in ("organization", "project", "beta")),
        *(f"anthropic-{name}" for name in ("version", "beta", "dangerous-direct-browser-access")),
        *(f"x-stainless-{name}" for name in STAINLESS),
        "*",
    ),
}
"""Paths of the edge itself, and the headers that pages may send to it."""

EXPOSED_HEADERS = ("retry-after", "x-request-id", "request-id", *QUOTA_HEADERS)
"""Headers that a browser's script may read, with CORS."""
LISTENER_SECRET, CLIENT_SECRET, CA_SECRET = "listener", "client", "frontends_ca"
NON_BMP = re.compile(r"[\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Paths of the files in the rendered configuration."""

    directory: Path

    @property
    def config(self) -> Path:
        """Envoy's own configuration."""
        return self.directory / "envoy.yaml"

    @property
    def admin_socket(self) -> Path:
        """Socket of Envoy's admin interface; only the owner can access the directory."""
        return self.directory / "admin.sock"

    @property
    def descriptors(self) -> Path:
        """Protobuf descriptors for transcoding."""
        return self.directory / "contracts.binpb"

    @property
    def lua(self) -> Path:
        """The filter that formats error responses."""
        return self.directory / ERRORS_LUA

    @property
    def requests_lua(self) -> Path:
        """The filter that brings requests to their usual form."""
        return self.directory / REQUESTS_LUA

    @property
    def endpoints(self) -> Path:
        """The endpoint file with the discovered frontends; Envoy watches it."""
        return self.directory / "endpoints.json"

    @property
    def keys(self) -> Path:
        """The filter that checks API keys, with the keys; Envoy watches it."""
        return self.directory / "api_keys.json"

    @property
    def pressure(self) -> Path:
        """The part of `connections_max` in use, 0 to 1; Envoy watches it."""
        return self.directory / "connection_pressure"

    def secret(self, name: str) -> Path:
        """File of one TLS secret; Envoy watches it."""
        return self.directory / f"tls_{name}.yaml"


def quoted(value: Any) -> Markup:
    """A value as one line of JSON that is valid YAML too: text is always a double-quoted ASCII scalar.

    Markup is returned unchanged: it is the template's own text, returned by a macro.
    """
    return value if isinstance(value, Markup) else Markup(_json(value))  # noqa: S704 -- the JSON is already escaped


def _json(value: Any) -> str:
    if isinstance(value, jinja2.Undefined):
        return str(value)  # raises UndefinedError: the template uses a value that was not passed
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot be represented in JSON")
    if isinstance(value, str):
        # JSON escapes characters beyond the BMP as two surrogates, which YAML does not accept; YAML uses one \U escape.
        pieces = NON_BMP.split(value)
        beyond = [f"\\U{ord(found):08x}" for found in NON_BMP.findall(value)]
        inner = [json.dumps(piece)[1:-1].replace("\x7f", "\\u007f") for piece in pieces]
        return '"' + "".join(a + b for a, b in zip(inner, [*beyond, ""], strict=True)) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_json(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(key)}: {_json(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def duration(seconds: float) -> str:
    """Seconds as a Duration in protobuf JSON."""
    return f"{seconds:.3f}s"


def host_pattern(names: Sequence[str], with_short: bool) -> str:
    """A regular expression (RE2) for Host headers that name one of these hosts, with any port.

    `with_short`: names without a dot too. No page on the public web has one, but a proxy's name for what stands behind
    it often does: nginx sends that of its `upstream`.
    """
    hosts = [re.escape(name) for name in names] + ["[a-z0-9_-]+"] * with_short
    return f"(?i)({'|'.join(hosts)})(:[0-9]+)?"


def render(
    config: EdgeConfig, keys: tuple[ApiKey, ...], output: Files, endpoints: Sequence[Endpoint] = ()
) -> dict[Path, bytes]:
    """Every file that Envoy needs, by path. The caller must restrict all of them to their owner: one contains the API
    keys.

    `endpoints` are the frontends discovered from the registry, if one is set.
    """
    values = {
        "config": config,
        "keys": keys,
        "files": output,
        "routes": transcoding.http_routes(),
        "paths": PATHS,
        "version": tandem.__version__,
        "services": transcoding.SERVICE_NAMES,
        "anthropic": {"service": transcoding.ANTHROPIC_SERVICE_NAME, "path": transcoding.ANTHROPIC_PATH},
        "health_service": transcoding.HEALTH_SERVICE_NAME,
        "exposed_headers": ", ".join(EXPOSED_HEADERS),
        "frontends": [_host_and_port(address) for address in config.frontends or ()],
        "dns_server": None if config.dns_server is None else _host_and_port(config.dns_server),
        "otlp": None if config.otlp_endpoint is None else _collector(config.otlp_endpoint),
        **_errors(),
    }
    rendered = {
        output.config: _render(TEMPLATE, values),
        output.descriptors: transcoding.descriptor_set(),
        output.lua: _render(ERRORS_TEMPLATE, values),
        output.requests_lua: _render(REQUESTS_TEMPLATE, values),
        output.pressure: b"0",
    }
    if keys:
        rendered[output.keys] = key_filter(keys)
    if config.registry is not None:
        rendered[output.endpoints] = assignment(endpoints)
    for name, cert, key, ca in (
        (LISTENER_SECRET, config.tls_cert, config.tls_key, None),
        (CLIENT_SECRET, config.upstream_tls_cert, config.upstream_tls_key, None),
        (CA_SECRET, None, None, config.upstream_tls_ca),
    ):
        if cert is not None or ca is not None:
            secret = {"name": name, "cert": _absolute(cert), "key": _absolute(key), "ca": _absolute(ca)}
            rendered[output.secret(name)] = _render(SECRET_TEMPLATE, {**secret, "names": _names(config)})
    return rendered


def _render(template: str, values: dict[str, Any]) -> bytes:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, finalize=quoted, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    environment.filters["host_pattern"] = host_pattern
    return environment.from_string(PARTS.joinpath(template).read_text()).render(values).encode()


def _errors() -> dict[str, Any]:
    """The table of HTTP errors, as both templates name its parts."""
    codes = http_errors.TRANSCODER_OVERRIDES
    return {
        "errors": http_errors.ERRORS,
        "overrides": {str(code_pb2.Code.Value(code)): http_errors.ERROR_BY_CODE[code].status for code in codes},
        "invalid_request": http_errors.INVALID_REQUEST,
        "api_error": http_errors.ANTHROPIC_API_ERROR,
        "server_error": http_errors.SERVER_ERROR,
        "too_large_reason": http_errors.TOO_LARGE_REASON,
        "too_large_status": http_errors.TOO_LARGE_STATUS,
    }


def _host_and_port(address: str) -> dict[str, Any]:
    host, port = split_address(address)
    return {"host": host, "port": port}


def _collector(endpoint: str) -> dict[str, Any]:
    """Host, port and TLS of the OpenTelemetry collector, from host:port or a URL."""
    scheme, separator, address = endpoint.rpartition("://")
    if not re.search(r":\d+$", address):
        address = f"{address}:{OTLP_PORT}"
    return {**_host_and_port(address), "tls": bool(separator) and scheme == "https"}


def _names(config: EdgeConfig) -> list[dict[str, Any]]:
    """Names, one of which must be in a frontend's certificate, each with its SAN type."""
    listed = config.frontends
    frontends = [FRONTEND_NAME] if listed is None else [split_address(address)[0] for address in listed]
    hosts = config.upstream_tls_names or dict.fromkeys(frontends)
    return [{"name": host, "kind": "IP_ADDRESS" if is_ip(host) else "DNS"} for host in hosts]


def _absolute(file: Path | None) -> str | None:
    return None if file is None else str(file.absolute())
