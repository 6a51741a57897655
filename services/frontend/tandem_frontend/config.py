"""Settings of the frontend beside those every process has."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from tandem.config import AdminConfig
from tandem.discovery.addresses import REGISTRY_TEXT, Addresses
from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.domain.worker import WORKER_ID_PATTERN
from tandem.errors import ConfigError

PROGRAM = "tandem-frontend"
REQUEST_BYTES_BASE = 2**20
REQUEST_BYTES_PER_TOKEN = 16


class FrontendConfig(AdminConfig):
    """The door for clients: text in, streamed text out; chooses the workers of each request and watches over them."""

    registry: Addresses = Field(description=REGISTRY_TEXT)
    frontend_id: str | None = Field(
        None,
        pattern=f"^{WORKER_ID_PATTERN}$",
        description="name in the registry, stable over restarts; default: frontend-host-port",
    )
    model: Path = Field(description="model directory in Hugging Face format; its weights are not read")
    model_name: str | None = Field(
        None,
        min_length=1,
        max_length=MODEL_NAME_CHARS_MAX,
        description="name clients ask for; default: the directory's",
    )
    processes: int = Field(
        1, ge=1, le=256, description="processes that serve the port together; a machine's cores less one are enough"
    )
    open_requests_max: int = Field(
        256, ge=1, le=100_000, description="requests open at a time, over all processes; more are refused"
    )
    overload_lag_s: float = Field(
        1,
        ge=0.05,
        le=300,
        description="while this process's event loop is later than this, new requests are refused; open ones go on",
    )
    request_bytes_max: int | None = Field(
        None,
        ge=64 * 2**10,
        le=2**30,
        description="most bytes of one request; default: 1 MiB, and 16 for each token of the model's context",
    )
    long_prompt_processes: int = Field(
        1,
        ge=0,
        le=16,
        description="most processes that tokenise prompts of over 64 Ki characters, beside this one; 0: a thread does",
    )
    leg_accept_timeout_s: float = Field(
        2, gt=0, le=300, description="a worker that does not take a leg for this long has failed"
    )
    leg_silence_timeout_s: float = Field(
        2, ge=1, le=300, description="a worker that has taken a leg and says nothing for this long has failed"
    )
    coalesce_ms: float = Field(
        25,
        ge=0,
        le=1_000,
        description="most milliseconds for which a busy frontend holds tokens so that they leave in one chunk; "
        "0: never; the first token never waits",
    )
    timelines_kept: int = Field(256, ge=1, le=100_000, description="requests that have ended and are still known of")
    tool_parser: str | None = Field(None, min_length=1, description="SGLang's parser of this model's tool calls")
    reasoning_parser: str | None = Field(None, min_length=1, description="SGLang's parser of this model's reasoning")

    trace_prompts: bool = Field(False, description="tell prompts in traces; they are personal data of your users")

    @model_validator(mode="after")
    def _every_process_may_take_a_request(self) -> Self:
        if self.open_requests_max < self.processes:
            raise ConfigError(
                "open_requests_max",
                f"must be {self.processes} or more, not {self.open_requests_max}: each process gets a part of it",
            )
        return self

    @property
    def served_name(self) -> str:
        """Name clients ask for."""
        return self.model_name or self.model.resolve().name

    def request_bytes(self, context_tokens_max: int) -> int:
        """Most bytes of one request to a model with that context.

        The longest one that can be served is one token a character, each of them spelt as six bytes of JSON; what is
        longer costs time and memory before it can be refused.
        """
        return self.request_bytes_max or REQUEST_BYTES_BASE + REQUEST_BYTES_PER_TOKEN * context_tokens_max
