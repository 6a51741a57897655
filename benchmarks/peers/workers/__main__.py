"""A fleet of fake workers as a process of its own; its options are the first line of standard input.

Owns the choice of the kind and the questions that the benchmark asks a fleet. Imports no more than that kind needs:
SMG's runs in SMG's environment.
"""

from __future__ import annotations

import json
import time
from typing import Any

from benchmarks.peers.lines import read_lines, run, say, serve
from benchmarks.peers.words import Words
from benchmarks.peers.workers.steps import Pace


def make_fleet(kind: str, words: Words, pace: Pace) -> Any:
    """A fleet by its kind's name."""
    if kind in ("contract1", "contract2"):
        from benchmarks.peers.workers.tandem_fleet import TandemFleet

        return TandemFleet(int(kind[-1]), words, pace)
    if kind == "smg":
        from benchmarks.peers.workers.smg_fleet import SmgFleet

        return SmgFleet(words, pace)
    from benchmarks.peers.workers.http_fleet import HttpFleet

    return HttpFleet(words, pace)


async def main() -> None:
    """Serve until the parent goes."""
    reader = await read_lines()
    options = json.loads(await reader.readline())
    fleet = make_fleet(options["kind"], Words(**options["words"]), Pace(**options["pace"]))
    ports = await fleet.open(options)
    say({"ports": ports, "starts": fleet.starts})

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        """Waits since the question before, with this process's clock."""
        waits, fleet.waits[:] = list(fleet.waits), []
        return {"waits": waits, "process_s": time.process_time()}

    await serve(reader, answer)


if __name__ == "__main__":
    run(main)
