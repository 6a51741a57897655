"""The options of the subcommands that inspect a running cluster: top, trace, profile.

Each is implemented in the module of its name, imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.exit_status import end

Registries = Annotated[
    str | None,
    typer.Option("--address", help="Registries: host:port or srv://NAME, comma-separated; default: of `tandem up`."),
]
TlsDirectory = Annotated[
    Path | None,
    typer.Option("--tls", help="Directory made by `tandem certs`; default: that of `tandem up` here.", metavar="DIR"),
]


def add_to(app: typer.Typer) -> None:
    """Register the subcommands."""
    app.command()(top)
    app.command()(trace)
    app.command()(profile)


def top(
    interval: Annotated[float, typer.Option(help="Refresh interval in seconds.", min=0.2, max=60)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print plain tables once and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per refresh.")] = False,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Live view of workers and frontends: load, queues, latencies, KV transfer, failures."""

    async def run() -> int:
        from tandem.cli.state import find_tls
        from tandem.cli.top.command import top as show

        return await show(
            await _registries(address), interval_s=interval, once=once, as_json=as_json, tls=find_tls(tls)
        )

    end("top", run())


def trace(
    request_id: Annotated[str, typer.Argument(help="Request id, or x-request-id of an HTTP response.")],
    frontend: Annotated[str | None, typer.Option(help="host:port of the frontend to query; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each timeline as one line of JSON.")] = False,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Show the timeline of one request, as recorded by its frontend."""

    async def run() -> int:
        from tandem.cli import trace as trace_command
        from tandem.cli.membership import checked_address
        from tandem.cli.state import find_tls

        found = find_tls(tls)
        if frontend is not None:
            frontends = [trace_command.Frontend(frontend, checked_address(frontend, "frontend"))]
        else:
            frontends = await trace_command.frontends_of(await _registries(address), found)
        return await trace_command.trace(request_id, frontends, as_json=as_json, tls=found)

    end("trace", run())


def profile(
    process: Annotated[str, typer.Argument(help="Worker or frontend id, or host:port.")],
    seconds: Annotated[float, typer.Option(help="Recording time in seconds.", min=0.1, max=60)] = 5.0,
    out: Annotated[Path, typer.Option(help="Output directory.", metavar="DIR")] = Path(),
    form: Annotated[str | None, typer.Option(help="Frontends only: speedscope or html; default: speedscope.")] = None,
    with_stack: Annotated[bool, typer.Option("--with-stack", help="Workers only: include Python frames.")] = False,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Record a profile of a process that runs with --admin-enabled (with `tandem up`: --admin)."""

    async def run() -> int:
        from tandem.cli import profile as profile_command
        from tandem.cli.membership import checked_address
        from tandem.cli.state import find_tls

        request, found = profile_command.profile_request(seconds, form, with_stack=with_stack), find_tls(tls)
        if ":" in process:
            process_address = checked_address(process, "PROCESS")
        else:
            process_address = await profile_command.address_of(process, await _registries(address), found)
        return await profile_command.profile(process, process_address, request, out, found)

    end("profile", run())


async def _registries(address: str | None) -> list[str]:
    from tandem.cli.membership import registry_addresses
    from tandem.cli.state import read_state

    return await registry_addresses(address or read_state().registry)
