"""Settings of the frontend beside those every process has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from tandem.config import AdminConfig
from tandem.discovery.addresses import REGISTRY_TEXT, Addresses
from tandem.domain.limits import MODEL_NAME_CHARS_MAX, PORT_MAX
from tandem.domain.worker import WORKER_ID_PATTERN
from tandem.errors import ConfigError
from tandem_frontend.call_context import SESSION_HEADER
from tandem_frontend.models.naming_rules import NamingRules
from tandem_frontend.preparation.cache_salt import CacheSharing
from tandem_frontend.routing.local_prefill import MAX_TOKENS, SHARE, LocalPrefillSettings
from tandem_frontend.routing.policy import PolicyName

PROGRAM = "tandem-frontend"
REQUEST_BYTES_BASE = 2**20
REQUEST_BYTES_PER_TOKEN = 16
CONTEXT_TOKENS = 131_072
"""Context for which the limit of a request is computed where no model is known at start."""
EVERY_MODEL = "*"
"""In the registry, the model of a frontend without one of its own."""


def parse_pairs(value: Any, form: str) -> Any:
    """A dict from "a=b,c=d", or the same as a table.

    Raises:
        ValueError: says what is malformed.
    """
    pairs = [part.strip().partition("=") for part in value.split(",")] if isinstance(value, str) else []
    found = {key: meant for key, _, meant in pairs} if isinstance(value, str) else value
    if not isinstance(found, dict) or (pairs and len(found) != len(pairs)):
        raise ValueError(f"must be {form}, each name once; several are separated by commas")
    for key, meant in found.items():
        if not (isinstance(key, str) and isinstance(meant, str)) or not (key and meant):
            raise ValueError(f"must be {form}; several are separated by commas")
        if max(len(key), len(meant)) > MODEL_NAME_CHARS_MAX:
            raise ValueError(f"must have names of at most {MODEL_NAME_CHARS_MAX} characters")
    return found


Aliases = Annotated[dict[str, str], BeforeValidator(lambda value: parse_pairs(value, "ALIAS=MODEL"))]


class FrontendConfig(AdminConfig):
    """Serves clients: text in, streamed text out. Selects the workers of each request and retries on their failure."""

    registry: Addresses = Field(description=REGISTRY_TEXT)
    frontend_id: str | None = Field(
        None,
        pattern=f"^{WORKER_ID_PATTERN}$",
        description="id in the registry, stable over restarts; default: frontend-HOST-PORT",
    )
    model: Path | None = Field(
        None,
        description="directory in Hugging Face format of a model that is served whether it has workers or not; its "
        "weights are not read. Every other model of the registry is served too: its tokenizer is read from a worker. "
        "Default: none",
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        max_length=MODEL_NAME_CHARS_MAX,
        description="name of that model, as its workers have it; default: the directory's name",
    )
    models_max: int = Field(
        16,
        ge=1,
        le=256,
        description="limit of models that are served at a time, each with its tokenizer in memory; further ones are "
        "refused until one has ended",
    )
    model_aliases: Aliases = Field(
        default_factory=dict,
        description="other names of models, as ALIAS=MODEL; several are separated by commas. A model that has the "
        "alias as its name comes first",
    )
    default_model: str | None = Field(
        None,
        min_length=1,
        max_length=MODEL_NAME_CHARS_MAX,
        description="model, or alias, of requests that name none; default: the only one, and where several are served "
        "such a request is refused",
    )
    model_linger_s: float = Field(
        60,
        ge=0,
        le=86_400,
        description="seconds for which a model stays without a worker: its requests are refused as retryable; then it "
        "ends, and they are refused as not found",
    )
    processes: int = Field(
        1, ge=1, le=256, description="processes that share the port; the machine's cores minus one are enough"
    )
    open_requests_max: int = Field(
        256, ge=1, le=100_000, description="limit of open requests, over all processes; more are rejected"
    )
    tenant_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="fraction of open_requests_max that one tenant (API key, or client address) may hold while no "
        "other has open requests; less while others have; 1: no limit",
    )
    tenant_requests_per_second: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="rate limit per tenant, over all processes; each choice counts as one request; default: none",
    )
    tenant_requests_burst: int | None = Field(
        None, ge=1, le=1_000_000, description="burst size of that rate limit; default: the requests of one second"
    )
    cache_sharing: str = Field(
        CacheSharing.TENANT.value,
        pattern=f"^({'|'.join(sharing.value for sharing in CacheSharing)})$",
        description="who shares the workers' prefix caches: tenant (the requests of one tenant, so that no other can "
        "find out by their times what it has sent) or all; the same at every frontend of a cluster",
    )
    overload_lag_s: float = Field(
        1,
        ge=0.05,
        le=300,
        description="event loop lag in seconds above which new requests are rejected; open ones continue",
    )
    request_bytes_max: int | None = Field(
        None,
        ge=64 * 2**10,
        le=2**30,
        description="limit of one request in bytes; default: 1 MiB plus 16 bytes per token of the context of `model`, "
        "or of 131,072 tokens without it",
    )
    long_prompt_processes: int = Field(
        1,
        ge=0,
        le=16,
        description="limit of helper processes that tokenise prompts of over 64 Ki characters; 0: use a thread instead",
    )
    prefill_queue_s: float = Field(
        5,
        gt=0,
        le=3600,
        description="seconds of work that may wait in one prefill worker; further prompts wait here. A prompt that has "
        "waited here for so long overtakes those of its client that are four times as long",
    )
    prefix_blocks_max: int = Field(
        1_000_000,
        ge=0,
        le=16_000_000,
        description="limit of cached blocks of all workers that each process keeps to route by, about 250 bytes each; "
        "beyond it the worker with the most blocks is routed to by load; 0: the workers' caches are not followed",
    )
    routing_policy: str = Field(
        PolicyName.AUTO.value,
        pattern=f"^({'|'.join(policy.value for policy in PolicyName)})$",
        description="how workers are picked: auto (prefix where workers publish their caches, otherwise least_work), "
        "random, power_of_two, least_work, prefix or session",
    )
    local_prefill: bool = Field(
        True,
        description="where pairs and aggregated workers serve the model: an aggregated worker takes short prompts, and "
        "those that it has computed before a prefill worker would begin them; false: routing_policy picks among all",
    )
    local_prefill_max_tokens: int | None = Field(
        None,
        ge=0,
        le=10_000_000,
        description="uncached prompt tokens up to which a prompt is short for local_prefill; default: 512",
    )
    local_prefill_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of an aggregated worker's time that local_prefill gives to prompts while it streams; it "
        "grows with the wait for a prefill worker beyond 0.25 s; default: 0.2",
    )
    session_header: str = Field(
        SESSION_HEADER,
        pattern="^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$",
        description="HTTP header, or gRPC metadata key, with the session's id, for the routing policy session; without "
        "it the tenant counts",
    )
    leg_accept_timeout_s: float = Field(
        2, gt=0, le=300, description="seconds within which a worker must accept a leg; otherwise the leg has failed"
    )
    leg_silence_timeout_s: float = Field(
        2, ge=1, le=300, description="seconds without a message from a worker after which its accepted legs have failed"
    )
    no_worker_wait_s: float = Field(
        5,
        ge=0,
        le=300,
        description="seconds for which requests wait, within their deadlines, for the successor of a worker that has "
        "left or was restarted; later ones are refused at once; 0: none waits",
    )
    coalesce_ms: float = Field(
        25,
        ge=0,
        le=1_000,
        description="longest time in milliseconds for which a busy frontend holds tokens to send them in one chunk; "
        "0: never; the first token is never held",
    )
    stream_comment_s: float = Field(
        2,
        ge=0,
        le=3600,
        description="time without an event after which a stream of OpenAI's or Anthropic's API gets a comment, so that "
        "clients and proxies wait for a long prefill; a failure after it has no HTTP status of its own; 0: none",
    )
    usage_log: str | None = Field(
        None,
        min_length=1,
        description="file to which one line of JSON is appended for each call when it ends (tenant, tokens, outcome), "
        "or stderr; default: none",
    )
    batch_directory: Path | None = Field(
        None,
        description="directory of files and batches, the same for all frontends of a cluster; default: none, and "
        "/v1/files and /v1/batches are refused",
    )
    batch_rows_max: int = Field(
        64, ge=1, le=10_000, description="limit of batch rows that run at a time while there are no live requests"
    )
    batch_rows_per_live_request: float = Field(
        0.08,
        gt=0,
        le=100,
        description="batch rows that may run for each live request, in the mean over time; live streams lose at most "
        "this fraction of their speed, and on GPUs much less",
    )
    batch_file_bytes_max: int = Field(200 * 2**20, ge=1024, le=2**40, description="limit of an uploaded file in bytes")
    batch_tenant_bytes_max: int = Field(
        10 * 2**30, ge=1024, le=2**50, description="limit of the files that one tenant keeps, in bytes"
    )
    batch_retention_s: float = Field(
        30 * 86_400,
        ge=3_600,
        le=10 * 366 * 86_400,
        description="seconds after which a file is deleted, and an ended batch",
    )
    timelines_kept: int = Field(256, ge=1, le=100_000, description="finished requests whose timelines are kept")
    tool_parser: str | None = Field(
        None,
        min_length=1,
        description="SGLang's tool call parser of `model`, or of several models as MODEL=PARSER, separated by commas",
    )
    reasoning_parser: str | None = Field(
        None, min_length=1, description="SGLang's reasoning parser of `model`, or of several models, in the same form"
    )

    console_port: int | None = Field(
        None,
        ge=0,
        le=PORT_MAX,
        description="port of the console, a page that shows the fleet and its requests; 0: any free port; default: "
        "none",
    )
    console_keys: Path | None = Field(
        None,
        description="file with one line `client-id: key` per user of the console; the playground's requests are that "
        "client's; required with console_port",
    )

    trace_prompts: bool = Field(False, description="record prompts in traces; they are personal data of your users")

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.model_name is not None and self.model is None:
            raise ConfigError("model_name", "requires model")
        for name in ("tool_parser", "reasoning_parser"):
            self.parser_of(name, "")
        if self.open_requests_max < self.processes:
            raise ConfigError(
                "open_requests_max",
                f"must be at least {self.processes}, not {self.open_requests_max}: it is divided among the processes",
            )
        if self.tenant_requests_burst is not None and self.tenant_requests_per_second is None:
            raise ConfigError("tenant_requests_burst", "requires tenant_requests_per_second")
        if (self.console_port is None) != (self.console_keys is None):
            missing = "console_port" if self.console_port is None else "console_keys"
            raise ConfigError(missing, "is missing: console_port and console_keys must be set together")
        if self.console_port == 0 and self.processes > 1:
            raise ConfigError("console_port", "must not be 0 with several processes: one of them serves the console")
        for name in ("local_prefill_max_tokens", "local_prefill_share"):
            if getattr(self, name) is not None and not self.local_prefill:
                raise ConfigError(name, "requires local_prefill")
        return self

    @property
    def local_prefill_settings(self) -> LocalPrefillSettings:
        """Those that are set, with the defaults of the others."""
        max_tokens, share = self.local_prefill_max_tokens, self.local_prefill_share
        return LocalPrefillSettings(MAX_TOKENS if max_tokens is None else max_tokens, SHARE if share is None else share)

    @property
    def served_name(self) -> str | None:
        """The name of `model`; None: it is not set."""
        return self.model_name or (None if self.model is None else self.model.resolve().name)

    @property
    def naming_rules(self) -> NamingRules:
        """Which names mean which model."""
        return NamingRules(self.models_max, self.model_aliases, self.default_model)

    @property
    def registered_name(self) -> str:
        """The model in this frontend's entry of the registry."""
        return self.served_name or EVERY_MODEL

    def parser_of(self, setting: str, model: str) -> str | None:
        """The parser of a model by tool_parser or reasoning_parser; None: it has none.

        Raises:
            ConfigError: the setting is malformed.
        """
        value: str | None = getattr(self, setting)
        if value is None or "=" not in value:
            return value if self.model is None or model == self.served_name else None
        try:
            parsers: dict[str, str] = parse_pairs(value, "MODEL=PARSER")
        except ValueError as problem:
            raise ConfigError(setting, str(problem)) from None
        return parsers.get(model)

    def request_bytes(self, context_tokens_max: int = CONTEXT_TOKENS) -> int:
        """Limit of one request in bytes for models with that context.

        The longest request that can be served has one token per character, each escaped as six bytes of JSON. Anything
        longer would cost time and memory before it is rejected.
        """
        return self.request_bytes_max or REQUEST_BYTES_BASE + REQUEST_BYTES_PER_TOKEN * context_tokens_max
