"""`tandem certs`: a development CA and a certificate for each role, made or renewed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tandem.tls.authority import issue_all


def certs(directory: Path, hosts: Sequence[str], days: int, console: Console) -> int:
    """Make or renew them and tell what there is now. Returns the exit status.

    Raises:
        ConfigError: an option is wrong.
        StartError: the directory cannot be written, or its CA cannot be used.
    """
    table = Table("certificate", "serial", "until (UTC)")
    for issued in issue_all(directory, hosts, days):
        table.add_row(f"{issued.name}.pem", f"{issued.serial_number:x}", f"{issued.end_time:%Y-%m-%d %H:%M}")
    console.print(table)
    console.print(
        f"Start a cluster with `tandem up --tls {directory}`. Run this again to renew: running processes take the new "
        "certificates by themselves.",
        highlight=False,
        soft_wrap=True,
    )
    return 0
