"""The options of `tandem`. Each subcommand is implemented in the module of its name; usage errors are printed here.

Subcommands are imported when they run, so that `tandem --help` prints at once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from tandem import __version__
from tandem.cli import adapter_commands, completion, inspect_commands, machine_commands
from tandem.cli.arguments import with_value
from tandem.cli.controller import CONTEXT, controller
from tandem.cli.exit_status import end
from tandem.cli.plan import plan
from tandem.cli.replay import replay
from tandem.cli.state import DEMO_MODEL
from tandem.cli.up_command import EngineName, LogDirectory, up

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
Address = Annotated[str | None, typer.Option(help="Frontend host:port; default: that of `tandem up` here.")]
TlsDirectory = Annotated[
    Path | None,
    typer.Option("--tls", help="Directory made by `tandem certs`; default: that of `tandem up` here.", metavar="DIR"),
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


app.command()(up)


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
adapter_commands.add_to(app)
machine_commands.add_to(app)
app.command()(replay)
app.command()(plan)
app.command(context_settings=CONTEXT)(controller)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as problem:
        raise typer.BadParameter(f"standard input is not UTF-8 (byte {problem.start})") from None
