"""The options of `tandem adapter load`, `unload` and `list`; implemented in `adapter`, imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.exit_status import end
from tandem.tls.paths import Tls

Registries = Annotated[
    str | None,
    typer.Option("--address", help="Registries: host:port or srv://NAME, comma-separated; default: of `tandem up`."),
]
TlsDirectory = Annotated[
    Path | None,
    typer.Option("--tls", help="Directory made by `tandem certs`; default: that of `tandem up` here.", metavar="DIR"),
]
AdaptersAtStart = Annotated[
    list[str] | None,
    typer.Option(help="LoRA adapter that all workers serve; may be given again.", metavar="NAME=DIRECTORY"),
]
AdapterRoot = Annotated[
    Path | None,
    typer.Option(
        help="Directory below which `tandem adapter load` may load adapters; default: none may be.", metavar="DIR"
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the adapter; clients request it as a model.")]

commands = typer.Typer(no_args_is_help=True, help="Load, unload and list the LoRA adapters of a fleet.")


def add_to(app: typer.Typer) -> None:
    """Register the subcommands."""
    app.add_typer(commands, name="adapter")


@commands.command()
def load(
    name: Name,
    path: Annotated[str, typer.Argument(help="Its directory at each worker, in or below the worker's adapter_root.")],
    model: Annotated[str | None, typer.Option(help="The model that it adapts; default: the only one.")] = None,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Load an adapter on all workers of a model, or on none."""
    from tandem.cli import adapter

    async def run() -> int:
        return await adapter.load(name, path, model, await _registries(address), _tls(tls))

    end("adapter load", run())


@commands.command()
def unload(name: Name, address: Registries = None, tls: TlsDirectory = None) -> None:
    """Unload an adapter on all workers; its open requests end first."""
    from tandem.cli import adapter

    async def run() -> int:
        return await adapter.unload(name, await _registries(address), _tls(tls))

    end("adapter unload", run())


@commands.command(name="list")
def list_adapters(
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
    address: Registries = None,
    tls: TlsDirectory = None,
) -> None:
    """Show the adapters of all workers."""
    from rich.console import Console

    from tandem.cli import adapter

    async def run() -> int:
        return await adapter.show(await _registries(address), Console(), as_json=as_json, tls=_tls(tls))

    end("adapter list", run())


async def _registries(address: str | None) -> list[str]:
    from tandem.cli.membership import registry_addresses
    from tandem.cli.state import read_state

    return await registry_addresses(address or read_state().registry)


def _tls(directory: Path | None) -> Tls | None:
    from tandem.cli.state import find_tls

    return find_tls(directory)
