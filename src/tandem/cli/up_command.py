"""The options of `tandem up`, and the cluster that they describe; `up` runs it.

Owns which option becomes which flag of which process. What a value means is checked by `checks` and by the processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.cli import adapter_commands, config_file
from tandem.cli.exit_status import end
from tandem.cli.state import DEMO_MODEL
from tandem.domain.network_address import bare_host

if TYPE_CHECKING:
    from tandem.local_cluster.cluster import ClusterSpec

Models = Annotated[
    list[str],
    typer.Option(
        help="Model directory in Hugging Face format. For several models, once for each, as NAME=DIRECTORY; each has "
        "as many workers; default: the package's tandem-demo.",
        metavar="[NAME=]DIRECTORY",
        show_default=False,
    ),
]
EmbeddingModels = Annotated[
    list[str] | None,
    typer.Option(
        help="Model that computes embeddings, with one worker; may be given again.", metavar="[NAME=]DIRECTORY"
    ),
]
ModelAliases = Annotated[
    list[str] | None, typer.Option(help="Another name of a model; may be given again.", metavar="ALIAS=MODEL")
]
DefaultModel = Annotated[str | None, typer.Option(help="Model of requests that name none; default: the only one.")]
EngineName = Annotated[
    str, typer.Option(help="Engine: sglang or simulated.", autocompletion=lambda: ("sglang", "simulated"))
]
LogDirectory = Annotated[
    Path | None,
    typer.Option(
        "--log-dir", help="Directory for process logs; default: a new one in .tandem/logs.", metavar="DIRECTORY"
    ),
]
Device = Annotated[str, typer.Option(help="Where the engines compute: auto (a GPU if there is one), cpu or cuda.")]
DataType = Annotated[
    str, typer.Option(help="Format of weights and KV: auto (the model's), float32, bfloat16, float16.")
]
KvCapacity = Annotated[
    int | None, typer.Option(help="KV cache tokens per worker; default: what fits on a GPU, 16384 on a CPU.")
]
Certificates = Annotated[
    Path | None, typer.Option(help="Directory made by `tandem certs`; default: plaintext.", metavar="DIR")
]
ConsulKey = Annotated[
    Path | None, typer.Option(help="Private key of --consul-cert; default: from --tls.", metavar="FILE")
]
RunningRequests = Annotated[
    int | None, typer.Option(help="Requests that a worker runs at a time; default: 256 on a GPU, 16 on a CPU.")
]
CanaryTimeout = Annotated[
    float, typer.Option(help="Seconds for a worker's canary; the first one compiles kernels on a GPU.")
]
Collector = Annotated[
    str | None, typer.Option(help="OTLP/gRPC collector for traces and metrics of all processes.", metavar="HOST:PORT")
]
ConsulAddress = Annotated[
    str | None,
    typer.Option(
        help="Keep membership in Consul: in a new local agent, or in the existing one at ADDRESS; "
        "default: in the registry's memory.",
        metavar="[ADDRESS]",
    ),
]
ConsulToken = Annotated[
    Path | None,
    typer.Option(help="File with the Consul ACL token; default: the token in $CONSUL_HTTP_TOKEN.", metavar="FILE"),
]
ConsulCa = Annotated[
    Path | None, typer.Option(help="CA file for the Consul agent; default: from --tls.", metavar="FILE")
]
ConsulCert = Annotated[
    Path | None, typer.Option(help="Client certificate for Consul; default: from --tls.", metavar="FILE")
]
Host = Annotated[
    str, typer.Option(help="Address of this machine on which all processes listen, such as ::1.", metavar="HOST")
]
ApiKeys = Annotated[
    Path | None,
    typer.Option(help="API keys of the edge, a line `client-id: key` each; default: no keys.", metavar="FILE"),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with options of this command, named with underscores; flags override it; default: none.",
        metavar="FILE",
        is_eager=True,
        callback=config_file.use,
    ),
]
LocalPrefill = Annotated[
    bool | None,
    typer.Option(
        "--local-prefill/--no-local-prefill",
        help="Aggregated workers take short prompts, and those that pairs would delay; default: the frontend's.",
    ),
]
LocalPrefillMaxTokens = Annotated[int | None, typer.Option(help="Uncached tokens up to which a prompt is short.")]
LocalPrefillShare = Annotated[
    float | None, typer.Option(help="Share of an aggregated worker's time for prompts, above 0, up to 1.")
]
WithMetrics = Annotated[bool, typer.Option("--metrics/--no-metrics", help="Open a Prometheus port in every process.")]
WithConsole = Annotated[
    bool, typer.Option("--console/--no-console", help="Serve a page that shows fleet and requests, behind a key.")
]


def up(
    context: typer.Context,
    prefill: Annotated[int, typer.Option(help="Number of prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(help="Number of decode workers.")] = 1,
    aggregated: Annotated[int, typer.Option(help="Number of workers that run both prefill and decode.")] = 0,
    model: Models = [str(DEMO_MODEL)],  # noqa: B006 -- typer reads it only
    model_name: Annotated[str | None, typer.Option(help="Served model name; default: name of --model.")] = None,
    embedding_model: EmbeddingModels = None,
    alias: ModelAliases = None,
    default_model: DefaultModel = None,
    adapter: adapter_commands.AdaptersAtStart = None,
    adapter_root: adapter_commands.AdapterRoot = None,
    engine: EngineName = "sglang",
    frontends: Annotated[int, typer.Option(help="Number of frontends.")] = 1,
    frontend_processes: Annotated[int, typer.Option(help="Processes per frontend.")] = 1,
    host: Host = "127.0.0.1",
    routing_policy: Annotated[
        str | None,
        typer.Option(help="auto, random, power_of_two, least_work, prefix or session; default: the frontend's."),
    ] = None,
    session_header: Annotated[str | None, typer.Option(help="Header with the session's id.")] = None,
    local_prefill: LocalPrefill = None,
    local_prefill_max_tokens: LocalPrefillMaxTokens = None,
    local_prefill_share: LocalPrefillShare = None,
    port: Annotated[int, typer.Option(help="gRPC port of the first frontend; 0: any free port.")] = 0,
    edge: Annotated[bool, typer.Option("--edge/--no-edge", help="Serve HTTP through Envoy.")] = True,
    http_port: Annotated[int, typer.Option(help="HTTP port of the edge; 0: any free port.")] = 0,
    api_keys: ApiKeys = None,
    device: Device = "auto",
    dtype: DataType = "auto",
    kv_capacity_tokens: KvCapacity = None,
    running_requests_max: RunningRequests = None,
    canary_timeout_s: CanaryTimeout = 300,
    engine_extra: Annotated[str, typer.Option(help="Further arguments of the engine, as a JSON object.")] = "{}",
    tool_parser: Annotated[str | None, typer.Option(help="SGLang's parser of tool calls for this model.")] = None,
    reasoning_parser: Annotated[str | None, typer.Option(help="SGLang's parser of reasoning for this model.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Allow `tandem profile` on workers and frontends.")] = False,
    log_dir: LogDirectory = None,
    otlp_endpoint: Collector = None,
    tls: Certificates = None,
    registries: Annotated[int, typer.Option(help="Number of registries; more than one requires --consul.")] = 1,
    consul: ConsulAddress = None,
    consul_service: Annotated[str, typer.Option(help="Service name of this cluster in Consul.")] = "tandem",
    consul_token_file: ConsulToken = None,
    consul_ca: ConsulCa = None,
    consul_cert: ConsulCert = None,
    consul_key: ConsulKey = None,
    metrics: WithMetrics = True,
    console: WithConsole = False,
    console_port: Annotated[int, typer.Option(help="Port of the console; 0: any free port.")] = 0,
    config: ConfigFile = None,
) -> None:
    """Run a cluster on this machine; Ctrl-C drains and stops it."""
    end("up", config_file.located(context, _run(locals())))


async def _run(given: Mapping[str, Any]) -> int:
    """Run the cluster of these options, by the names of `up`'s parameters; returns the exit status."""
    from rich.console import Console

    from tandem.cli import up as running
    from tandem.cli.checks import named_models
    from tandem.cli.consul_options import read_options

    files = {name: given[f"consul_{name}"] for name in ("token_file", "ca", "cert", "key")}
    consul = read_options(given["consul"], given["consul_service"], environ=os.environ, **files)
    named = named_models(given["model"], given["model_name"], given["embedding_model"] or ())
    return await running.up(replace(_spec(given), consul=consul, **named), Console())


def _spec(given: Mapping[str, Any]) -> ClusterSpec:
    from tandem.local_cluster.cluster import ClusterSpec

    same = ("engine", "registries", "prefill", "decode", "aggregated", "frontends", "frontend_processes")
    return ClusterSpec(
        model=DEMO_MODEL,
        log_directory=given["log_dir"],
        worker_flags=_worker_flags(given),
        role_flags={
            "frontend": _frontend_flags(given),
            "edge": _flags(given, "api_keys"),
        },
        frontend_port=given["port"],
        host=bare_host(given["host"]),
        console_port=given["console_port"] if given["console"] else None,
        **{name: given[name] for name in (*same, "edge", "http_port", "tls", "metrics", "otlp_endpoint")},
    )


def _worker_flags(given: Mapping[str, Any]) -> dict[str, str]:
    engine = ("device", "dtype", "engine_extra", "canary_timeout_s", "kv_capacity_tokens", "running_requests_max")
    adapters = {"adapters": ",".join(given["adapter"]) if given["adapter"] else None}
    return _flags({**given, **adapters}, *engine, "adapters", "adapter_root") | _admin(given)


def _frontend_flags(given: Mapping[str, Any]) -> dict[str, str]:
    routing = ("routing_policy", "session_header", "local_prefill", "local_prefill_max_tokens", "local_prefill_share")
    aliases = {"model_aliases": ",".join(given["alias"]) if given["alias"] else None}
    parsers = ("tool_parser", "reasoning_parser")
    return _flags({**given, **aliases}, *parsers, "model_aliases", "default_model", *routing) | _admin(given)


def _admin(given: Mapping[str, Any]) -> dict[str, str]:
    return {"admin-enabled": "true"} if given["admin"] else {}


def _flags(given: Mapping[str, Any], *names: str) -> dict[str, str]:
    """Flags of the options of these names that have a value."""
    return {name.replace("_", "-"): _text(given[name]) for name in names if given[name] is not None}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)
