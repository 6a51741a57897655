"""`tandem top` itself: which of its forms is shown, and for how long."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from tandem.cli.top import plain
from tandem.cli.top.poller import FleetWatch
from tandem.tls.paths import Tls

ONCE_TIMEOUT_S = 3.0
"""Most time to wait for everybody's second word, which rates are made of."""
LOOK_S = 0.05


async def top(
    registries: Sequence[str], *, interval_s: float, once: bool, as_json: bool, tls: Tls | None = None
) -> int:
    """Show the fleet until the person leaves, or once. Returns the exit status.

    Raises:
        StartError: an address is not that of a registry.
        TandemError: no registry answers.
    """
    watch = FleetWatch(registries, min(interval_s, ONCE_TIMEOUT_S / 3) if once else interval_s, tls)
    async with watch.following():
        if once or as_json:
            await _until_all_spoke(watch)
            await _print(watch, interval_s, once=once, as_json=as_json)
        elif sys.stdout.isatty() and sys.stdin.isatty():
            from tandem.cli.top.screen import TopScreen

            await TopScreen(watch.sample, interval_s).run_async()
        else:
            await _until_all_spoke(watch)
            await _print(watch, interval_s, once=True, as_json=False)
    return 0


async def _print(watch: FleetWatch, interval_s: float, *, once: bool, as_json: bool) -> None:
    while True:
        sample = watch.sample()
        print(plain.line(sample) if as_json else plain.tables(sample), flush=True)
        if once:
            return
        await asyncio.sleep(interval_s)


async def _until_all_spoke(watch: FleetWatch) -> None:
    for _ in range(int(ONCE_TIMEOUT_S / LOOK_S)):
        if not watch.sample().missing:
            return
        await asyncio.sleep(LOOK_S)
