"""The options of the subcommands that look into a running cluster: top, trace, profile.

What each one does is in the file of its name, imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.exit_status import end

Registries = Annotated[
    str | None, typer.Option("--address", help="host:port of registries, with commas; default: of `tandem up` here.")
]
TlsDirectory = Annotated[
    Path | None,
    typer.Option("--tls", help="Directory of `tandem certs`; default: what `tandem up` runs with here.", metavar="DIR"),
]


def add_to(app: typer.Typer) -> None:
    """Make them subcommands."""
    app.command()(top)
    app.command()(trace)
    app.command()(profile)


def top(
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=60)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print plain tables and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each look.")] = False,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Show workers and frontends, live: load, queues, latencies, KV transfer, failures."""

    async def run() -> int:
        from tandem.cli.state import find_tls
        from tandem.cli.top.command import top as show

        return await show(
            await _registries(address), interval_s=interval, once=once, as_json=as_json, tls=find_tls(tls)
        )

    end("top", run())


def trace(
    request_id: Annotated[str, typer.Argument(help="Id of the request, or x-request-id of an HTTP answer.")],
    frontend: Annotated[str | None, typer.Option(help="host:port of the frontend to ask; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The timeline as JSON, one line.")] = False,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Show what happened to one request and when, as its frontend remembers it."""

    async def run() -> int:
        from tandem.cli import trace as trace_command
        from tandem.cli.state import find_tls

        found = find_tls(tls)
        if frontend is not None:
            asked = [trace_command.Frontend(frontend, frontend)]
        else:
            asked = await trace_command.frontends_of(await _registries(address), found)
        return await trace_command.trace(request_id, asked, as_json=as_json, tls=found)

    end("trace", run())


def profile(
    process: Annotated[str, typer.Argument(help="Name of a worker or frontend, or host:port.")],
    seconds: Annotated[float, typer.Option(help="How long to record, 0.1 to 60.", min=0.1, max=60)] = 5.0,
    out: Annotated[Path, typer.Option(help="Where the files are written.", metavar="DIR")] = Path(),
    form: Annotated[str | None, typer.Option(help="Of a frontend: speedscope or html; default: speedscope.")] = None,
    with_stack: Annotated[bool, typer.Option("--with-stack", help="Of a worker: with Python frames.")] = False,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Record what a process does; it must have been started with --admin-enabled (of `up`: --admin)."""

    async def run() -> int:
        from tandem.cli import profile as profile_command
        from tandem.cli.state import find_tls

        request, found = profile_command.profile_request(seconds, form, with_stack=with_stack), find_tls(tls)
        where = process
        if ":" not in process:
            where = await profile_command.address_of(process, await _registries(address), found)
        return await profile_command.profile(process, where, request, out, found)

    end("profile", run())


async def _registries(address: str | None) -> list[str]:
    from tandem.cli.membership import registry_addresses
    from tandem.cli.state import read_state

    return await registry_addresses(address or read_state().registry)
