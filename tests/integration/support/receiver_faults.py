"""A fault in the thread that receives an engine's hand-over messages, brought in as SGLang takes any plugin.

`plug_in` writes the distribution; the thread then raises at the message of its role in MESSAGE, which is well-formed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FATAL_ROOM = 424_242
MESSAGE = {
    "prefill": [b"ABORT", str(FATAL_ROOM).encode()],
    "decode": [b"ABORT_ACK", str(FATAL_ROOM).encode(), b"0", b"1"],
}
_MODULE = f'''
import multiprocessing


def register():
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def fail(manager, msg):
        if msg[1:2] == [b"{FATAL_ROOM}"]:
            raise RuntimeError("a fault of the test's own")

    manager = "sglang.srt.disaggregation.nixl.conn.NixlKVManager"
    for name in ("_handle_abort_notification", "handle_abort_ack_message"):
        HookRegistry.register(f"{{manager}}.{{name}}", fail, HookType.BEFORE)
'''


def plug_in(directory: Path, environment: pytest.MonkeyPatch) -> None:
    """Write the plugin, and have every worker that is started from now on find it."""
    (directory / "receiver_fault.py").write_text(_MODULE)
    information = directory / "receiver_fault-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: receiver-fault\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[sglang.srt.plugins]\nreceiver = receiver_fault:register\n")
    environment.setenv("PYTHONPATH", os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]))
