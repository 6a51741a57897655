"""A fault inside SGLang's scheduler, brought in as SGLang takes any plugin: by an entry point that it finds.

`plug_in` writes the distribution; the scheduler then raises at the first prompt that begins with FAULT_TOKENS.
"""

from __future__ import annotations

from pathlib import Path

FAULT_TOKENS = (7, 7, 7, 7)
SENTENCE = "a fault of the test's own"
_MODULE = f'''
import multiprocessing


def register():
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def fail(scheduler, request, *arguments, **keywords):
        if tuple(request.input_ids[:4]) == {FAULT_TOKENS!r}:
            raise RuntimeError("{SENTENCE}")

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.handle_generate_request", fail, HookType.BEFORE)
'''


def plug_in(directory: Path) -> Path:
    """Write the plugin; returns the directory that must be on the workers' PYTHONPATH."""
    (directory / "scheduler_fault.py").write_text(_MODULE)
    information = directory / "scheduler_fault-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: scheduler-fault\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[sglang.srt.plugins]\nfault = scheduler_fault:register\n")
    return directory
