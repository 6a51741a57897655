"""Starting SGLang's Engine under an event loop of ours: imported only when an engine starts, because it imports SGLang.

SGLang's Engine expects to own its process: it takes over signals, kills the process when a child fails or a task of its
own raises, and kills every child of the process at its end. The subclass here and `front_half` take exactly
these rights away.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.managers.load_snapshot import shm_path_for

from tandem.engine.sglang.front_half import FrontHalf
from tandem.engine.sglang.hooks import kv_snapshot

IPC = "ipc://"


def construct(
    arguments: dict[str, Any], on_child: Callable[[str, BaseProcess], None], on_file: Callable[[Path], None]
) -> Any:
    """Build SGLang's engine; blocks until the model is loaded.

    Must run on a thread that lives as long as the engine: the children ask the kernel to kill them when the thread that
    started them ends. Not the main thread, or SGLang installs its signal handlers.

    Args:
        arguments: of ServerArgs.
        on_child: called with the name of each child and the process, as soon as it runs.
        on_file: called with each file that SGLang leaves behind when its children are killed, before it exists.
    """

    class GuestEngine(Engine):  # type: ignore[misc]
        """SGLang's engine, with its children known to us from the start."""

        @staticmethod
        def init_tokenizer_manager_func(server_args: Any, port_args: Any) -> Any:
            return init_tokenizer_manager(server_args, port_args, FrontHalf)

        @classmethod
        def _launch_scheduler_processes(cls, server_args: Any, port_args: Any, *more: Any, **keywords: Any) -> Any:
            on_file(Path(shm_path_for(port_args.instance_id)))
            result, processes = super()._launch_scheduler_processes(server_args, port_args, *more, **keywords)
            for process in processes:
                on_child("scheduler", process)
            return result, processes

        @classmethod
        def _launch_detokenizer_subprocesses(cls, *positional: Any, **keywords: Any) -> tuple[list[Any], list[str]]:
            """None: see `hooks._skip_detokenizer`. It would cost 400 MB, a hop for each token and half the start."""
            return [], []

        @staticmethod
        def _ensure_event_loop() -> None:
            """Only SGLang's blocking methods need a loop of their own."""

        def shutdown(self) -> None:
            """Registered to run at exit, where it would kill children that are not SGLang's."""

    kv_snapshot.read_accounts()
    logging.getLogger("sglang").setLevel(arguments["log_level"].upper())
    engine = GuestEngine(**arguments)
    # Ours watches the children already; this one sends SIGQUIT to the whole process.
    engine.tokenizer_manager._subprocess_watchdog.stop()
    if arguments.get("enable_trace"):
        _trace_here(engine)
    return engine


def _trace_here(engine: Any) -> None:
    """SGLang's scheduler begins to trace by itself; in this process only its HTTP server would."""
    from sglang.srt.observability import trace

    args = engine.server_args
    trace.process_tracing_init(args.otlp_traces_endpoint, args.otlp_service_name, trace_modules=args.trace_modules)
    trace.trace_set_thread_info(f"{args.disaggregation_mode} front half")


def scheduler_info(engine: Any) -> dict[str, Any]:
    """What the scheduler said of itself when it was up."""
    info: dict[str, Any] = engine._scheduler_init_result.scheduler_infos[0]
    return info


def dismantle(engine: Any) -> None:
    """Close what SGLang leaves open in this process. Its children must be gone already."""
    manager = engine.tokenizer_manager
    if manager.bootstrap_server is not None:
        manager.bootstrap_server.close()
    for socket in (manager.recv_from_detokenizer, manager.send_to_scheduler, engine.send_to_rpc):
        if socket is not None:
            socket.close(linger=0)
    manager.load_snapshot_reader.close()
    leftovers = [Path(manager.load_snapshot_reader.path)]
    names = (getattr(engine.port_args, name) for name in vars(engine.port_args))
    leftovers += [Path(name.removeprefix(IPC)) for name in names if isinstance(name, str) and name.startswith(IPC)]
    for file in leftovers:
        with contextlib.suppress(OSError):
            file.unlink()
