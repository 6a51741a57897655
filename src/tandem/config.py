"""Settings of a process: defaults < file < environment < flags, validated once at start.

Owns their precedence. An unknown, malformed or out-of-range key stops the process with exit status 2 and an error that
names the key. pydantic checks types and ranges.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tandem import __version__, config_errors
from tandem.domain.limits import PORT_MAX
from tandem.domain.network_address import checked_host
from tandem.errors import ConfigError
from tandem.tls.paths import Tls

CONVENTIONS = {"otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}


def _as_url(value: Any) -> Any:
    """Add `http://`: without a scheme the exporter would use TLS."""
    return f"http://{value}" if isinstance(value, str) and value and "://" not in value else value


def _checked_endpoint(value: str | None) -> str | None:
    """Reject a URL that no collector can have: the exporter would only log it, again and again."""
    if value is None:
        return None
    try:
        url = urlsplit(value)
        is_good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_good = False
    if not is_good or not re.fullmatch(r"https?://[^\s/?#@]+", value):
        raise ValueError(
            f"must be host:port, or an http or https URL without a path, not {value.removeprefix('http://')!r}"
        )
    return value


Host = Annotated[str, AfterValidator(checked_host)]
"""A host name or an IP address; the brackets of an IPv6 address are removed."""


class ServiceConfig(BaseModel):
    """Settings of every Tandem process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Host = Field("127.0.0.1", description="address to listen on; 0.0.0.0 or :: for every one of the machine")
    port: int = Field(0, ge=0, le=PORT_MAX, description="port to listen on; 0: any free port")
    advertise_host: Host | None = Field(
        None, description="host under which other processes reach this one; default: host"
    )
    drain_settle_s: float = Field(
        0.5,
        ge=0,
        le=60,
        description="seconds for which a draining process still admits requests after it has announced the drain",
    )
    drain_timeout_s: float = Field(
        30, ge=0, le=3600, description="seconds to wait for open requests when draining; then they are aborted"
    )
    announce_file: Path | None = Field(
        None, description="file to write address and process id to, as JSON, once serving"
    )
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="least severe level that is logged"
    )
    log_format: str = Field(
        "auto",
        pattern="^(auto|json|text)$",
        description="json (one object per line), text, or auto (text on a terminal, else json)",
    )
    otlp_endpoint: Annotated[str | None, BeforeValidator(_as_url), AfterValidator(_checked_endpoint)] = Field(
        None,
        description="OTLP/gRPC collector (host:port or URL); default: $OTEL_EXPORTER_OTLP_ENDPOINT, or none",
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="fraction of requests whose trace is exported, unless the caller has decided"
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=PORT_MAX,
        description="port on which Prometheus scrapes /metrics; 0: any free port; default: none",
    )

    @property
    def reachable_host(self) -> str:
        """Host under which other processes reach this one."""
        return self.advertise_host or self.host


class RpcServiceConfig(ServiceConfig):
    """Settings of every process that serves and calls gRPC; the edge has its own TLS settings."""

    tls_cert: Path | None = Field(
        None, description="certificate (PEM) of this process; reloaded when the file changes; default: plaintext"
    )
    tls_key: Path | None = Field(None, description="private key of that certificate (PEM)")
    tls_ca: Path | None = Field(None, description="CA certificates (PEM) that verify every peer")

    @property
    def tls(self) -> Tls | None:
        """TLS files of this process; None: plaintext."""
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        return Tls(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca)

    @model_validator(mode="after")
    def _all_of_tls_or_nothing(self) -> Self:
        """Reject an incomplete set: it would mean plaintext where the operator expects TLS."""
        given = {"tls_cert": self.tls_cert, "tls_key": self.tls_key, "tls_ca": self.tls_ca}
        missing = [key for key, value in given.items() if value is None]
        if missing and len(missing) < len(given):
            raise ConfigError(missing[0], "is missing: tls_cert, tls_key and tls_ca must be set together")
        return self


class AdminConfig(RpcServiceConfig):
    """Settings of every process that can record profiles."""

    admin_enabled: bool = Field(False, description="allow clients to record profiles; recording slows the process down")


C = TypeVar("C", bound=BaseModel)


def load(config_type: type[C], program: str, argv: Sequence[str], environ: Mapping[str, str]) -> C:
    """Read the settings of `program` (for example "tandem-decode"; its variables are then TANDEM_DECODE_*).

    Raises:
        ConfigError: a key is unknown or its value is invalid; names the first one.
    """
    flags = vars(_parser(config_type, program).parse_args(argv))
    config_file = flags.pop("config", None) or environ.get(f"{variable_prefix(program)}CONFIG")
    values = {
        **_from_convention(config_type, environ),
        **_from_file(config_type, config_file),
        **_from_environment(config_type, variable_prefix(program), environ),
        **{key: value for key, value in flags.items() if value is not None},
    }
    try:
        return config_type.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(key, config_errors.sentence(config_type.model_fields, first)) from None


def effective(config: BaseModel) -> str:
    """All settings as one line of JSON, with secrets masked."""
    return json.dumps(config.model_dump(mode="json"))


def variable_prefix(program: str) -> str:
    """Beginning of a program's variables: "TANDEM_DECODE_" for "tandem-decode"."""
    return program.upper().replace("-", "_") + "_"


def flag_name(name: str) -> str:
    """Flag of a setting: "--drain-settle-s" for "drain_settle_s"."""
    return "--" + name.replace("_", "-")


def _parser(config_type: type[BaseModel], program: str) -> argparse.ArgumentParser:
    """Flags stay strings here; pydantic converts them, so that errors read alike for flags, files and variables."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=(config_type.__doc__ or "").strip(),
        epilog="Each flag is also a key of the TOML file given by --config, and a variable "
        f"{variable_prefix(program)}<KEY>.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    for name, field in config_type.model_fields.items():
        explanation = config_errors.explanation(field).replace("%", "%%")
        parser.add_argument(flag_name(name), dest=name, metavar=config_errors.metavar(name, field), help=explanation)
    return parser


def _from_file(config_type: type[BaseModel], file: str | None) -> dict[str, Any]:
    if not file:
        return {}
    try:
        values = tomllib.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError("config", f"{file} cannot be read: {problem}") from None
    for key in values:
        if key not in config_type.model_fields:
            raise ConfigError(key, f"is not a setting ({file})")
    return values


def _from_convention(config_type: type[BaseModel], environ: Mapping[str, str]) -> dict[str, Any]:
    """Values of conventional variables shared by all programs; every Tandem-specific source overrides them."""
    given = {key: environ[name] for key, name in CONVENTIONS.items() if environ.get(name)}
    return {key: value.rstrip("/") for key, value in given.items() if key in config_type.model_fields}


def _from_environment(config_type: type[BaseModel], prefix: str, environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, value in environ.items():
        if not variable.startswith(prefix) or variable == f"{prefix}CONFIG":
            continue
        key = variable.removeprefix(prefix).lower()
        if key not in config_type.model_fields:
            raise ConfigError(key, f"is not a setting (environment variable {variable})")
        values[key] = value
    return values
