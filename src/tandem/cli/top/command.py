"""Entry point of `tandem top`: chooses screen, tables or JSON."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from tandem.cli.top import plain
from tandem.cli.top.poller import FleetWatch
from tandem.tls.paths import Tls

ONCE_TIMEOUT_S = 3.0
"""Limit of the wait for two reports of every process: a rate needs two."""
POLL_INTERVAL_S = 0.05


async def top(
    registries: Sequence[str], *, interval_s: float, once: bool, as_json: bool, tls: Tls | None = None
) -> int:
    """Show the fleet until the user quits, or once. Returns the exit status.

    Raises:
        StartError: an address is not that of a registry.
        TandemError: no registry can be reached.
    """
    watch = FleetWatch(registries, min(interval_s, ONCE_TIMEOUT_S / 3) if once else interval_s, tls)
    async with watch.following():
        if once or as_json:
            await _wait_for_reports(watch)
            await _print(watch, interval_s, once=once, as_json=as_json)
        elif sys.stdout.isatty() and sys.stdin.isatty():
            from tandem.cli.top.screen import TopScreen

            await TopScreen(watch.sample, interval_s).run_async()
        else:
            await _wait_for_reports(watch)
            await _print(watch, interval_s, once=True, as_json=False)
    return 0


async def _print(watch: FleetWatch, interval_s: float, *, once: bool, as_json: bool) -> None:
    while True:
        sample = watch.sample()
        print(plain.line(sample) if as_json else plain.tables(sample), flush=True)
        if once:
            return
        await asyncio.sleep(interval_s)


async def _wait_for_reports(watch: FleetWatch) -> None:
    for _ in range(int(ONCE_TIMEOUT_S / POLL_INTERVAL_S)):
        if not watch.sample().missing:
            return
        await asyncio.sleep(POLL_INTERVAL_S)
