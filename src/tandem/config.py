"""Settings of a process: defaults < file < environment < flags, checked once at start.

Owns precedence and the one sentence an operator sees. A key that is unknown, malformed or out of range stops the
process with exit status 2 and is named. Types and ranges are pydantic's work.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tandem import config_errors
from tandem.domain.limits import PORT_MAX
from tandem.errors import ConfigError
from tandem.tls.paths import Tls

CONVENTIONS = {"otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}


def _as_url(value: Any) -> Any:
    """Without a scheme an exporter would take TLS for granted."""
    return f"http://{value}" if isinstance(value, str) and value and "://" not in value else value


class ServiceConfig(BaseModel):
    """Settings every Tandem process has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=PORT_MAX, description="port to listen on; 0: the OS chooses")
    advertise_host: str | None = Field(None, description="host other processes reach this one at; default: host")
    drain_settle_s: float = Field(0.5, ge=0, le=60, description="still admit this long after a drain was announced")
    drain_timeout_s: float = Field(30, ge=0, le=3600, description="most time for running requests to finish")
    announce_file: Path | None = Field(None, description="write address and process id there, as JSON, once serving")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level that is logged")
    log_format: str = Field(
        "auto",
        pattern="^(auto|json|text)$",
        description="json (one object a line), text (for a terminal), auto (text on a terminal, else json)",
    )
    otlp_endpoint: Annotated[str | None, BeforeValidator(_as_url)] = Field(
        None,
        pattern=r"^https?://[^\s/]+$",
        description="OTLP collector over gRPC (host:port, or a URL); default: OTEL_EXPORTER_OTLP_ENDPOINT, or none",
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="part of the requests whose trace is exported, where the caller has not decided"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=PORT_MAX, description="port where Prometheus scrapes /metrics; 0: the OS chooses; default: none"
    )

    @property
    def reachable_host(self) -> str:
        """Host that other processes use."""
        return self.advertise_host or self.host


class RpcServiceConfig(ServiceConfig):
    """Settings of every process that serves and calls others over gRPC; the edge has rules of its own."""

    tls_cert: Path | None = Field(None, description="certificate (PEM) this process presents; read again on change")
    tls_key: Path | None = Field(None, description="private key of that certificate (PEM)")
    tls_ca: Path | None = Field(None, description="CAs (PEM) whose certificates are accepted of every peer")

    @property
    def tls(self) -> Tls | None:
        """What this process proves itself with; None: plaintext."""
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        return Tls(cert=self.tls_cert, key=self.tls_key, ca=self.tls_ca)

    @model_validator(mode="after")
    def _all_of_tls_or_nothing(self) -> Self:
        """Half of it would be plaintext that looks like TLS."""
        given = {"tls_cert": self.tls_cert, "tls_key": self.tls_key, "tls_ca": self.tls_ca}
        missing = [key for key, value in given.items() if value is None]
        if missing and len(missing) < len(given):
            raise ConfigError(missing[0], "is missing: tls_cert, tls_key and tls_ca are given together or not at all")
        return self


class AdminConfig(RpcServiceConfig):
    """Settings of every process that can be asked for a profile."""

    admin_enabled: bool = Field(False, description="give profiles to whoever may call; they slow the process down")


C = TypeVar("C", bound=BaseModel)


def load(config_type: type[C], program: str, argv: Sequence[str], environ: Mapping[str, str]) -> C:
    """Read the settings of `program` (for example "tandem-decode"; its variables are then TANDEM_DECODE_*).

    Raises:
        ConfigError: names the first key at fault.
    """
    flags = vars(_parser(config_type, program).parse_args(argv))
    config_file = flags.pop("config", None) or environ.get(f"{_prefix(program)}CONFIG")
    values = {
        **_from_convention(config_type, environ),
        **_from_file(config_type, config_file),
        **_from_environment(config_type, _prefix(program), environ),
        **{key: value for key, value in flags.items() if value is not None},
    }
    try:
        return config_type.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(key, config_errors.sentence(config_type.model_fields, first)) from None


def effective(config: BaseModel) -> str:
    """All settings as one line of JSON, secrets masked."""
    return json.dumps(config.model_dump(mode="json"))


def _prefix(program: str) -> str:
    return program.upper().replace("-", "_") + "_"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser(config_type: type[BaseModel], program: str) -> argparse.ArgumentParser:
    """Flags carry strings; pydantic gives them their types, so that a wrong value is reported in one way."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=(config_type.__doc__ or "").strip(),
        epilog=f"Each flag is also a key of the TOML file given by --config, and a variable {_prefix(program)}<KEY>.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    for name, field in config_type.model_fields.items():
        explanation = config_errors.explanation(field).replace("%", "%%")
        parser.add_argument(_flag(name), dest=name, metavar=config_errors.metavar(name, field), help=explanation)
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
    """Variables that people set for all their programs; whatever is said to this one alone counts more."""
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
