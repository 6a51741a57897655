"""Entry points through which SGLang's own processes find Tandem (groups sglang.srt.platforms and sglang.srt.plugins).

SGLang calls both in its main process and in every child. They do nothing unless an adapter has switched them on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal

from tandem.engine.sglang.environment import plugin_device
from tandem.service.parent_death import follow


def activate() -> str | None:
    """The platform to use: plain PyTorch on a CPU, or None to leave SGLang's own choice (CUDA) alone."""
    return "tandem.engine.sglang.platform.PlainCpuPlatform" if plugin_device() == "cpu" else None


def register() -> None:
    """Register the hooks of this process."""
    device = plugin_device()
    if device is None:
        return
    from tandem.engine.sglang.hooks import registry

    parent = multiprocessing.parent_process()
    if parent is None:
        registry.register_in_main()
        return
    # SGLang asks for the same, but does not look whether its parent has died by then.
    assert parent.pid is not None
    if not follow(parent.pid, signal.SIGKILL):
        os._exit(1)
    # A signal to the whole group (Ctrl-C, systemd) reaches the children too, and must not end them before their parent
    # has drained. They end when the parent says so, and by PR_SET_PDEATHSIG when it dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    registry.register_in_child(device)
