"""Holds that keep a request of the real engine in one phase of its leg, brought in as SGLang takes any plugin.

`plug_in` writes the distribution. A prompt's first token says in which phase its request may be held; a file for each
worker says in which phases that worker holds now; what was held is written to another file, which is the proof.
Nothing of it is in the product, and without its files it does nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

MARKS = {"bootstrapping": 11, "prefilling": 12, "transferring": 13, "decoding": 14}
"""The first token of a prompt that is to be held in that phase."""
DIRECTORY = "TANDEM_TEST_HOLDS"
CHUNK_S, STEP_S = 0.3, 0.2
"""What a held step over a prompt and a held decode step take. Not a stop: a scheduler that stands hears of no abort."""

_MODULE = """
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

PHASES = {number: phase for phase, number in __MARKS__.items()}
rids, rooms, passes = {}, {}, {}


def worker_id():
    arguments = Path(f"/proc/{multiprocessing.parent_process().pid}/cmdline").read_text().split("\\0")
    return next(a.partition("=")[2] for a in arguments if a.startswith("--worker-id="))


class Holds:
    def __init__(self):
        self.file = Path(os.environ["__DIRECTORY__"]) / worker_id()
        self.reported = self.file.with_suffix(".held").open("a", buffering=1)

    def at(self, phase):
        try:
            return phase in self.file.read_text().split()
        except FileNotFoundError:
            return False

    def are_over(self, room):
        return self.file.with_name(f"{room}.free").exists()

    def report(self, phase, room):
        self.reported.write(json.dumps({"phase": phase, "room": room, "time_s": time.monotonic()}) + "\\n")


def register():
    if multiprocessing.parent_process() is None or "__DIRECTORY__" not in os.environ:
        return
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    holds = Holds()

    def note(scheduler, request, *arguments, **keywords):
        phase = PHASES.get(request.input_ids[0]) if len(request.input_ids) > 1 else None
        if phase is not None:
            rids[request.rid] = (phase, request.bootstrap_room)
            rooms[request.bootstrap_room] = phase

    def step(scheduler, batch, *arguments, **keywords):
        wanted = {"prefill": "prefilling", "decode": "decoding"}[scheduler.disaggregation_mode.value]
        held = [room for phase, room in (rids.get(req.rid, (None, 0)) for req in batch.reqs) if phase == wanted]
        held = [room for room in held if not holds.are_over(room)]
        if held and holds.at(wanted):
            for room in held:
                holds.report(wanted, room)
            time.sleep(__CHUNK_S__ if wanted == "prefilling" else __STEP_S__)

    def preallocate(original, queue, rids_to_check=None, *arguments, **keywords):
        waits = holds.at("bootstrapping")
        free = []
        for decode_req in queue.queue:
            phase, room = rids.get(decode_req.req.rid, (None, 0))
            # One that has failed or was aborted is let go, as it would be without this.
            stays = waits and phase == "bootstrapping" and decode_req.kv_receiver.poll() != KVPoll.Failed
            if stays and passes.get(room, 0) == 0:
                passes[room] = 1
                holds.report(phase, room)
            if not stays:
                free.append(decode_req.req.rid)
        return original(queue, free, *arguments, **keywords)

    def transfer(result, manager, bootstrap_room, status):
        room = bootstrap_room
        if status != KVPoll.Transferring or rooms.get(room) != "transferring":
            return
        # From the second chunk on: some pages have been written then, and some have not.
        passes[room] = passes.get(room, 0) + 1
        if passes[room] == 2 and holds.at("transferring"):
            holds.report("transferring", room)
            while holds.at("transferring") and not holds.are_over(room):
                time.sleep(0.01)

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    HookRegistry.register(f"{scheduler}.handle_generate_request", note, HookType.BEFORE)
    HookRegistry.register(f"{scheduler}.run_batch", step, HookType.BEFORE)
    queue = "sglang.srt.disaggregation.decode.DecodePreallocQueue"
    HookRegistry.register(f"{queue}.pop_preallocated", preallocate, HookType.AROUND)
    manager = "sglang.srt.disaggregation.nixl.conn.NixlKVManager"
    HookRegistry.register(f"{manager}.update_status", transfer, HookType.AFTER)
"""


@dataclass(frozen=True, slots=True)
class Held:
    """A request that a worker has held, once for each step."""

    worker: str
    phase: str
    room: int
    time_s: float
    """On the clock of `history.now_s`: it is the same in all processes of a machine."""


class Holds:
    """Who is held where, now."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def begin(self, *workers: str, phases: tuple[str, ...] = tuple(MARKS)) -> None:
        """Have workers hold in these phases, and in no other."""
        for worker in workers:
            draft = self.directory / f"{worker}.draft"
            draft.write_text("\n".join(phases))
            os.replace(draft, self.directory / worker)

    def end(self, *workers: str) -> None:
        """Hold nothing any more in these workers; in none if none is named."""
        for file in [self.directory / worker for worker in workers] or list(self.directory.iterdir()):
            if not file.suffix:
                file.unlink(missing_ok=True)

    def free(self, room: int) -> None:
        """Let one request go on, whatever holds it: others may wait behind it."""
        (self.directory / f"{room}.free").touch()

    def held(self) -> list[Held]:
        """Whatever has been held so far, in all workers."""
        return [
            Held(file.stem, **json.loads(line))
            for file in self.directory.glob("*.held")
            for line in file.read_text().splitlines()
        ]


def plug_in(directory: Path, environment: pytest.MonkeyPatch) -> Holds:
    """Write the plugin, and have every worker that is started from now on find it."""
    values = {"MARKS": repr(MARKS), "DIRECTORY": DIRECTORY, "CHUNK_S": str(CHUNK_S), "STEP_S": str(STEP_S)}
    module = _MODULE
    for name, value in values.items():
        module = module.replace(f"__{name}__", value)
    (directory / "leg_holds.py").write_text(module)
    information = directory / "leg_holds-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: leg-holds\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[sglang.srt.plugins]\nholds = leg_holds:register\n")
    holds = Holds(directory / "holds")
    environment.setenv(DIRECTORY, str(holds.directory))
    environment.setenv("PYTHONPATH", os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return holds
