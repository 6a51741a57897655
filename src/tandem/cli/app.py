"""The options of `tandem`. Each subcommand is implemented in the module of its name; usage errors are printed here.

Subcommands are imported when they run, so that `tandem --help` prints at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from tandem import __version__
from tandem.cli import completion, config_file, inspect_commands, machine_commands
from tandem.cli.arguments import with_value
from tandem.cli.controller import CONTEXT, controller
from tandem.cli.exit_status import end
from tandem.cli.plan import plan
from tandem.cli.replay import replay
from tandem.cli.state import DEMO_MODEL
from tandem.domain.network_address import bare_host

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Large language models served with prefill and decode disaggregated.",
)

PLAIN_MESSAGES = {
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
}

Model = Annotated[
    Path,
    typer.Option(
        # Its path is another one in each installation.
        help="Model directory in Hugging Face format; default: the package's tandem-demo.",
        metavar="DIRECTORY",
        show_default=False,
    ),
]
Models = Annotated[
    list[str],
    typer.Option(
        help="Model directory in Hugging Face format. For several models, once for each, as NAME=DIRECTORY; each has "
        "as many workers; default: the package's tandem-demo.",
        metavar="[NAME=]DIRECTORY",
        show_default=False,
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
Address = Annotated[str | None, typer.Option(help="Frontend host:port; default: that of `tandem up` here.")]
TlsDirectory = Annotated[
    Path | None,
    typer.Option("--tls", help="Directory made by `tandem certs`; default: that of `tandem up` here.", metavar="DIR"),
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
MinP = Annotated[float | None, typer.Option(help="Minimum probability relative to the most likely token, 0 to 1.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Penalty for tokens that already appeared, -2 to 2.")]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Penalty proportional to how often a token appeared, -2 to 2.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Multiplicative repetition penalty, above 0, up to 2; 1: off.")
]
Logprobs = Annotated[
    int | None, typer.Option(help="Show log probabilities, with N alternatives per token.", metavar="N")
]
AsChat = Annotated[
    bool | None,
    typer.Option("--chat/--plain", help="Prompt as chat message or plain text; default: by the model's chat template."),
]


def run() -> int:
    """Run the command line; returns the exit status."""
    completion.prepare()
    try:
        return int(app(with_value(sys.argv[1:]), prog_name="tandem", standalone_mode=False) or 0)
    except TyperException as problem:
        message = problem.format_message()
        for library_message, plain_message in PLAIN_MESSAGES.items():
            message = message.replace(library_message, plain_message)
        # Without arguments the help has been printed already, and the message is empty.
        if message:
            context = getattr(problem, "ctx", None)
            print(f"{context.command_path if context else 'tandem'}: {message}", file=sys.stderr)
        return problem.exit_code


@app.callback(invoke_without_command=True)
def version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Large language models served with prefill and decode disaggregated."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def up(
    context: typer.Context,
    prefill: Annotated[int, typer.Option(help="Number of prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(help="Number of decode workers.")] = 1,
    aggregated: Annotated[int, typer.Option(help="Number of workers that run both prefill and decode.")] = 0,
    model: Models = [str(DEMO_MODEL)],  # noqa: B006 -- typer reads it only
    model_name: Annotated[str | None, typer.Option(help="Served model name; default: name of --model.")] = None,
    alias: ModelAliases = None,
    default_model: DefaultModel = None,
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
    from rich.console import Console

    from tandem.cli import up as up_command
    from tandem.cli.checks import named_models
    from tandem.cli.consul_options import read_options
    from tandem.local_cluster.cluster import ClusterSpec

    flags = {
        "device": device,
        "dtype": dtype,
        "engine-extra": engine_extra,
        "canary-timeout-s": f"{canary_timeout_s:g}",
    }
    flags |= _given({"kv-capacity-tokens": kv_capacity_tokens, "running-requests-max": running_requests_max})
    flags |= _given({"admin-enabled": "true" if admin else None})
    parsers = {"tool-parser": tool_parser, "reasoning-parser": reasoning_parser}
    naming = {"model-aliases": ",".join(alias) if alias else None, "default-model": default_model}
    routing = {
        "routing-policy": routing_policy,
        "session-header": session_header,
        "local-prefill": None if local_prefill is None else str(local_prefill).lower(),
        "local-prefill-max-tokens": local_prefill_max_tokens,
        "local-prefill-share": local_prefill_share,
    }
    role_flags = {"frontend": _given({**parsers, **naming, **routing, "admin-enabled": "true" if admin else None})}
    role_flags["edge"] = _given({"api-keys": None if api_keys is None else str(api_keys)})
    files = {"token_file": consul_token_file, "ca": consul_ca, "cert": consul_cert, "key": consul_key}

    async def run() -> int:
        consul_options = read_options(consul, consul_service, environ=os.environ, **files)
        named = named_models(model, model_name)
        return await up_command.up(replace(spec, consul=consul_options, **named), Console())

    spec = ClusterSpec(
        model=DEMO_MODEL, engine=engine, log_directory=log_dir, worker_flags=flags,
        role_flags=role_flags, registries=registries, prefill=prefill, decode=decode, aggregated=aggregated,
        frontends=frontends, frontend_processes=frontend_processes, frontend_port=port, edge=edge, http_port=http_port,
        tls=tls, metrics=metrics, otlp_endpoint=otlp_endpoint, host=bare_host(host),
        console_port=console_port if console else None,
    )  # fmt: skip
    end("up", config_file.located(context, run()))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_tokens: Annotated[int | None, typer.Option(help="Maximum number of tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling probability mass, above 0, up to 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens; -1: all.")] = None,
    min_p: MinP = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    repetition_penalty: RepetitionPenalty = None,
    logprobs: Logprobs = None,
    seed: Annotated[int | None, typer.Option(help="Random seed, for repeatable sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    chat: AsChat = None,
    system: Annotated[str | None, typer.Option(help="System message; requires --chat.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name; default: the only served model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per event.")] = False,
    address: Address = None,
    tls: TlsDirectory = None,
) -> None:
    """Stream a completion to the terminal."""
    from rich.console import Console

    from tandem.cli import generate as generate_command
    from tandem.cli.membership import checked_address
    from tandem.cli.state import find_tls, read_state

    asked = generate_command.Asked(
        prompt=_standard_input() if prompt == "-" else prompt,
        chat=chat,
        system=system,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logprobs=logprobs,
        seed=seed,
        stop=tuple(stop or ()),
        as_json=as_json,
    )

    async def run() -> int:
        frontend = checked_address(address, "address") if address else read_state().frontend
        return await generate_command.generate(frontend, replace(asked, tls=find_tls(tls)), Console(stderr=True))

    end("generate", run())


@app.command()
def status(
    address: Annotated[
        str | None,
        typer.Option(help="Registries: host:port or srv://NAME, comma-separated; default: of `tandem up` here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    tls: TlsDirectory = None,
) -> None:
    """Show state, load and lease of all workers and frontends, and the view of each registry."""
    from rich.console import Console

    from tandem.cli import status as status_command
    from tandem.cli.membership import registry_addresses
    from tandem.cli.state import find_tls, read_state

    async def run() -> int:
        addresses = await registry_addresses(address or read_state().registry)
        return await status_command.status(addresses, Console(), as_json=as_json, tls=find_tls(tls))

    end("status", run())


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Worker id, as shown by `tandem status`.")],
    address: Annotated[
        str | None,
        typer.Option(help="Registries: host:port or srv://NAME, comma-separated; default: of `tandem up` here."),
    ] = None,
    tls: TlsDirectory = None,
) -> None:
    """Drain a worker: finish its open legs, then stop it. `tandem up` restarts it."""
    from tandem.cli import operations as drain_command
    from tandem.cli.membership import registry_addresses
    from tandem.cli.state import find_tls, read_state

    async def run() -> int:
        addresses = await registry_addresses(address or read_state().registry)
        return await drain_command.drain(worker, addresses, find_tls(tls))

    end("drain", run())


@app.command()
def role(
    worker: Annotated[str, typer.Argument(help="Worker id, as shown by `tandem status`.")],
    role: Annotated[
        str,
        typer.Argument(
            help="New role: prefill, decode or aggregated.", autocompletion=lambda: ("prefill", "decode", "aggregated")
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Also when no other worker of its present role is serving.")
    ] = False,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds for open legs to end, then their streams continue on other workers; default: the worker's.",
            min=0,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Registries: host:port or srv://NAME, comma-separated; default: of `tandem up` here."),
    ] = None,
    tls: TlsDirectory = None,
) -> None:
    """Change the role of a worker: drain it, switch its engine, serve again in a new epoch."""
    from tandem.cli import role as role_command
    from tandem.cli.membership import registry_addresses
    from tandem.cli.state import find_tls, read_state

    async def run() -> int:
        wanted = role_command.parse_role(role)
        addresses = await registry_addresses(address or read_state().registry)
        return await role_command.role(
            worker, wanted, addresses, force=force, drain_timeout_s=drain_timeout, tls=find_tls(tls)
        )

    end("role", run())


@app.command()
def demo(model: Model = DEMO_MODEL, engine: EngineName = "sglang", log_dir: LogDirectory = None) -> None:
    """Start a cluster, stream one completion, print a summary, stop the cluster."""
    from rich.console import Console

    from tandem.cli import demo as demo_command
    from tandem.local_cluster.cluster import ClusterSpec

    end("demo", demo_command.demo(ClusterSpec(model=model, engine=engine, log_directory=log_dir), Console()))


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port of any Tandem process.")],
    service: Annotated[str, typer.Option(help="Full protobuf name of a service; default: the whole process.")] = "",
    tls: TlsDirectory = None,
) -> None:
    """Check the health of a process; exit status 0 if it is serving."""
    from tandem.cli import operations as health_command
    from tandem.cli.membership import checked_address
    from tandem.cli.state import find_tls

    async def run() -> int:
        return await health_command.health(checked_address(address, "ADDRESS"), service, find_tls(tls))

    end("health", run())


@app.command()
def certs(
    directory: Annotated[Path, typer.Argument(help="Directory of the certificates to create or renew.", metavar="DIR")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="DNS name or IP address of a host of the services; repeatable. Default: those of the last run."
        ),
    ] = None,
    days: Annotated[int, typer.Option(help="Validity of the certificates, in days.")] = 90,
) -> None:
    """Create a development CA and one certificate per role, or renew those certificates."""

    async def run() -> int:
        # `cryptography` takes 70 ms to import, which the other commands need not pay.
        from rich.console import Console

        from tandem.cli import operations as certs_command

        return certs_command.certs(directory, host or [], days, Console())

    end("certs", run())


inspect_commands.add_to(app)
machine_commands.add_to(app)
app.command()(replay)
app.command()(plan)
app.command(context_settings=CONTEXT)(controller)


def _given(flags: Mapping[str, str | float | None]) -> dict[str, str]:
    return {name: str(value) for name, value in flags.items() if value is not None}


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as problem:
        raise typer.BadParameter(f"standard input is not UTF-8 (byte {problem.start})") from None
