"""Damage to the KV of hand-overs, brought into SGLang's scheduler as SGLang takes any plugin, by an entry point.

Only a prompt that begins with `mark(kind)` is damaged, once: its repetition on this or another worker is not.
"""

from __future__ import annotations

from pathlib import Path

from tests.integration.support import kv_fault_plugin
from tests.integration.support.kv_fault_plugin import FIRED, KINDS, MARK

__all__ = ["FIRED", "KINDS", "fired", "mark", "plug_in"]


def mark(kind: str) -> tuple[int, ...]:
    """The first tokens of a prompt that asks for a fault of this kind."""
    return (*MARK, KINDS.index(kind))


def plug_in(directory: Path) -> dict[str, str]:
    """Write the plugin; returns the environment of the processes that are to have it, PYTHONPATH to be put first."""
    (directory / "kv_fault_plugin.py").write_text(Path(kv_fault_plugin.__file__).read_text())
    information = directory / "kv_fault_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-fault-plugin\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[sglang.srt.plugins]\nkv_faults = kv_fault_plugin:register\n")
    fired = directory / "fired"
    fired.mkdir()
    return {"PYTHONPATH": str(directory), FIRED: str(fired)}


def fired(directory: Path) -> list[str]:
    """The kinds of the faults that have fired."""
    return sorted(path.name.rpartition("-")[0] for path in (directory / "fired").iterdir())
