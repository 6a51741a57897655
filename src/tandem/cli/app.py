"""The options of `tandem`. What each subcommand does is in the file of its name; errors become one sentence here.

The subcommands are imported when they run, so that `tandem --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from tandem import __version__
from tandem.cli.arguments import with_value
from tandem.cli.exit_status import end
from tandem.cli.inspect_commands import add_to
from tandem.cli.state import DEMO_MODEL

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Large language models served with prefill and decode disaggregated.",
)

PLAIN_WORDS = {
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
}

Model = Annotated[Path, typer.Option(help="Model directory in Hugging Face format.", metavar="DIRECTORY")]
EngineName = Annotated[str, typer.Option(help="sglang or simulated.")]
LogDirectory = Annotated[
    Path | None,
    typer.Option("--log-dir", help="Where the processes log; default: a new one in .tandem/logs.", metavar="DIRECTORY"),
]
Address = Annotated[str | None, typer.Option(help="host:port; default: the cluster that `tandem up` runs here.")]
TlsDirectory = Annotated[
    Path | None,
    typer.Option("--tls", help="Directory of `tandem certs`; default: what `tandem up` runs with here.", metavar="DIR"),
]


def run() -> int:
    """Run the command line; returns the exit status."""
    try:
        return int(app(with_value(sys.argv[1:]), prog_name="tandem", standalone_mode=False) or 0)
    except TyperException as problem:
        words = problem.format_message()
        for given, plain in PLAIN_WORDS.items():
            words = words.replace(given, plain)
        # Called without arguments, it has shown the help, and there is nothing to say.
        if words:
            context = getattr(problem, "ctx", None)
            print(f"{context.command_path if context else 'tandem'}: {words}", file=sys.stderr)
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
    prefill: Annotated[int, typer.Option(help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(help="Decode workers.")] = 1,
    aggregated: Annotated[int, typer.Option(help="Workers that do both halves.")] = 0,
    model: Model = DEMO_MODEL,
    model_name: Annotated[str | None, typer.Option(help="Name clients ask for; default: the directory's.")] = None,
    engine: EngineName = "sglang",
    frontends: Annotated[int, typer.Option(help="Frontends.")] = 1,
    frontend_processes: Annotated[int, typer.Option(help="Processes of each frontend.")] = 1,
    port: Annotated[int, typer.Option(help="Port of the first frontend; 0: the OS chooses.")] = 0,
    edge: Annotated[bool, typer.Option("--edge/--no-edge", help="Answer HTTP, through Envoy.")] = True,
    http_port: Annotated[int, typer.Option(help="Port for HTTP; 0: the OS chooses.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kv_capacity_tokens: Annotated[int | None, typer.Option(help="Tokens whose KV each worker keeps.")] = None,
    engine_extra: Annotated[str, typer.Option(help="More arguments of the engine, as a JSON object.")] = "{}",
    tool_parser: Annotated[str | None, typer.Option(help="SGLang's parser of the model's tool calls.")] = None,
    reasoning_parser: Annotated[str | None, typer.Option(help="SGLang's parser of the model's reasoning.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Let `tandem profile` record workers and frontends.")] = False,
    log_dir: LogDirectory = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="OTLP collector (gRPC) for traces and metrics of all processes.", metavar="HOST:PORT"),
    ] = None,
    tls: Annotated[Path | None, typer.Option(help="Directory of `tandem certs`.", metavar="DIR")] = None,
    registries: Annotated[int, typer.Option(help="Registries; more than one need --consul.")] = 1,
    consul: Annotated[
        str | None,
        typer.Option(
            help="Keep membership in Consul: in an agent of the cluster's own, or in the one at that address.",
            metavar="[ADDRESS]",
        ),
    ] = None,
    consul_service: Annotated[str, typer.Option(help="Name of this cluster in Consul.")] = "tandem",
    consul_token_file: Annotated[
        Path | None, typer.Option(help="Holds the ACL token; default: of $CONSUL_HTTP_TOKEN.", metavar="FILE")
    ] = None,
    consul_ca: Annotated[
        Path | None, typer.Option(help="CAs of that agent's certificate; default: of --tls.", metavar="FILE")
    ] = None,
    consul_cert: Annotated[
        Path | None, typer.Option(help="Certificate shown to that agent; default: of --tls.", metavar="FILE")
    ] = None,
    consul_key: Annotated[Path | None, typer.Option(help="Its private key.", metavar="FILE")] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics/--no-metrics", help="Give every process a port for Prometheus.")
    ] = True,
) -> None:
    """Run a cluster on this machine until Ctrl-C, which drains it."""
    from rich.console import Console

    from tandem.cli import up as up_command
    from tandem.cli.consul_options import read_options
    from tandem.local_cluster.cluster import ClusterSpec

    flags = {"device": device, "dtype": dtype, "engine-extra": engine_extra}
    if kv_capacity_tokens is not None:
        flags["kv-capacity-tokens"] = str(kv_capacity_tokens)
    role_flags = {"frontend": _given({"tool-parser": tool_parser, "reasoning-parser": reasoning_parser})}
    if admin:
        flags["admin-enabled"] = role_flags["frontend"]["admin-enabled"] = "true"
    files = {"token_file": consul_token_file, "ca": consul_ca, "cert": consul_cert, "key": consul_key}

    async def run() -> int:
        kept_in = read_options(consul, consul_service, environ=os.environ, **files)
        return await up_command.up(replace(spec, consul=kept_in), Console())

    spec = ClusterSpec(
        model=model,
        log_directory=log_dir,
        model_name=model_name,
        engine=engine,
        registries=registries,
        prefill=prefill,
        decode=decode,
        aggregated=aggregated,
        frontends=frontends,
        frontend_processes=frontend_processes,
        frontend_port=port,
        edge=edge,
        http_port=http_port,
        worker_flags=flags,
        role_flags=role_flags,
        tls=tls,
        metrics=metrics,
        otlp_endpoint=otlp_endpoint,
    )
    end("up", run())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, over 0 to 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens; -1: all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least part of the likeliest token's probability.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Against tokens already there, -2 to 2.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time, -2 to 2.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Divides their logits, over 0 to 2.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Show log probabilities, and those of the N likeliest tokens.", metavar="N")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be given several times.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="As a message, or as plain text; default: what the model takes."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model; default: the only one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each event.")] = False,
    address: Address = None,
    tls: TlsDirectory = None,
) -> None:
    """Stream a completion to the terminal."""
    from rich.console import Console

    from tandem.cli import generate as generate_command
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
        tls=find_tls(tls),
    )

    async def run() -> int:
        return await generate_command.generate(address or read_state().frontend, asked, Console(stderr=True))

    end("generate", run())


@app.command()
def status(
    address: Annotated[
        str | None, typer.Option(help="Registries: host:port or srv://NAME, with commas; default: of `tandem up` here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, as JSON.")] = False,
    tls: TlsDirectory = None,
) -> None:
    """Show workers, frontends and registries: states, load, leases, where the view is from. More with --json."""
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
    worker: Annotated[str, typer.Argument(help="Name of the worker, as `tandem status` shows it.")],
    address: Annotated[
        str | None, typer.Option(help="Registries: host:port or srv://NAME, with commas; default: of `tandem up` here.")
    ] = None,
    tls: TlsDirectory = None,
) -> None:
    """Let a worker finish what it has and end; `tandem up` then starts it again."""
    from tandem.cli import operations as drain_command
    from tandem.cli.membership import registry_addresses
    from tandem.cli.state import find_tls, read_state

    async def run() -> int:
        addresses = await registry_addresses(address or read_state().registry)
        return await drain_command.drain(worker, addresses, find_tls(tls))

    end("drain", run())


@app.command()
def demo(model: Model = DEMO_MODEL, engine: EngineName = "sglang", log_dir: LogDirectory = None) -> None:
    """Start a cluster, stream one answer through it, tell what happened, stop it."""
    from rich.console import Console

    from tandem.cli import demo as demo_command
    from tandem.local_cluster.cluster import ClusterSpec

    end("demo", demo_command.demo(ClusterSpec(model=model, engine=engine, log_directory=log_dir), Console()))


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port of any Tandem process.")],
    service: Annotated[str, typer.Option(help="Full protobuf name of one of its services.")] = "",
    tls: TlsDirectory = None,
) -> None:
    """Ask a process for its health: exit status 0 when it serves."""
    from tandem.cli import operations as health_command
    from tandem.cli.state import find_tls

    end("health", health_command.health(address, service, find_tls(tls)))


@app.command()
def certs(
    directory: Annotated[Path, typer.Argument(help="Where the certificates are made, or renewed.", metavar="DIR")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or IP address of a machine the services run on; may be given several times. Default: as before."
        ),
    ] = None,
    days: Annotated[int, typer.Option(help="How long the certificates hold.")] = 90,
) -> None:
    """Make a development CA and a certificate for each role, or renew the certificates of that CA."""

    async def run() -> int:
        # Making certificates needs a library that takes 70 ms to load, which other commands do not pay.
        from rich.console import Console

        from tandem.cli import operations as certs_command

        return certs_command.certs(directory, host or [], days, Console())

    end("certs", run())


add_to(app)


def _given(flags: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in flags.items() if value is not None}


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as problem:
        raise typer.BadParameter(f"standard input is not UTF-8 (byte {problem.start})") from None
