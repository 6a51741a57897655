"""Starts SGLang's Engine inside this process. Imports SGLang, so it is imported only when an engine starts.

SGLang's Engine expects to own its process: it installs signal handlers, kills the process when a child fails or one of
its tasks raises, and kills every child of the process at shutdown. The subclass here and `front_half` disable exactly
that.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.managers.load_snapshot import shm_path_for

from tandem.engine.sglang import role_switch
from tandem.engine.sglang.children import scheduler_names
from tandem.engine.sglang.front_half import FrontHalf
from tandem.engine.sglang.hooks import kv_snapshot

IPC = "ipc://"


def construct(
    arguments: dict[str, Any], on_child: Callable[[str, BaseProcess], None], on_file: Callable[[Path], None]
) -> Any:
    """Build SGLang's engine; blocks until the model is loaded.

    Must run on a thread that lives as long as the engine: the children set PR_SET_PDEATHSIG, which kills them when the
    thread that started them ends. Must not be the main thread, or SGLang installs its signal handlers.

    Args:
        arguments: keyword arguments of ServerArgs.
        on_child: called with the name and process of each child as soon as it is started.
        on_file: called, before the file exists, with each file that SGLang leaves behind when its children are killed.
    """

    class GuestEngine(Engine):  # type: ignore[misc]
        """SGLang's engine, with every child process reported to `on_child`."""

        @staticmethod
        def init_tokenizer_manager_func(server_args: Any, port_args: Any) -> Any:
            return init_tokenizer_manager(server_args, port_args, FrontHalf)

        @classmethod
        def _launch_scheduler_processes(cls, server_args: Any, port_args: Any, *more: Any, **keywords: Any) -> Any:
            on_file(Path(shm_path_for(port_args.instance_id)))
            result, processes = super()._launch_scheduler_processes(server_args, port_args, *more, **keywords)
            for name, process in zip(scheduler_names(len(processes)), processes, strict=True):
                on_child(name, process)
            return result, processes

        @classmethod
        def _launch_detokenizer_subprocesses(cls, *positional: Any, **keywords: Any) -> tuple[list[Any], list[str]]:
            """Start none (`hooks._skip_detokenizer`): it would cost 400 MB, a hop per token and half the start time."""
            return [], []

        @staticmethod
        def _ensure_event_loop() -> None:
            """Do nothing: only SGLang's blocking methods, which are not used here, need an event loop of their own."""

        def shutdown(self) -> None:
            """Do nothing: SGLang registers this at exit, where it would kill children that are not SGLang's."""

    kv_snapshot.read_accounts()
    logging.getLogger("sglang").setLevel(arguments["log_level"].upper())
    engine = GuestEngine(**arguments)
    # `children` watches the processes already; SGLang's watchdog would send SIGQUIT to this process.
    engine.tokenizer_manager._subprocess_watchdog.stop()
    if arguments.get("enable_trace"):
        _trace_here(engine)
    return engine


def _trace_here(engine: Any) -> None:
    """Start SGLang's tracing in this process: its scheduler does so by itself, but here only its HTTP server would."""
    from sglang.srt.observability import trace

    args = engine.server_args
    trace.process_tracing_init(args.otlp_traces_endpoint, args.otlp_service_name, trace_modules=args.trace_modules)
    trace.trace_set_thread_info(f"{args.disaggregation_mode} front half")


def scheduler_info(engine: Any) -> dict[str, Any]:
    """The scheduler's start-up message: sizes of its KV pool, and under FACTS_KEY what the hooks add."""
    info: dict[str, Any] = engine._scheduler_init_result.scheduler_infos[0]
    return info


def dismantle(engine: Any) -> None:
    """Close the sockets and remove the files that SGLang leaves in this process. Its children must have ended.

    Another engine may follow in this process, so nothing may refer to this one any more.
    """
    atexit.unregister(engine.shutdown)
    manager = engine.tokenizer_manager
    if manager.bootstrap_server is not None:
        role_switch.end_server(manager.bootstrap_server)
    sockets = (manager.recv_from_detokenizer, manager.send_to_scheduler, engine.send_to_rpc)
    opened = [socket for socket in sockets if socket is not None]
    for socket in opened:
        socket.close(linger=0)
    # SGLang makes two; each has three threads and a dozen descriptors.
    for context in {id(socket.context): socket.context for socket in opened}.values():
        context.destroy(linger=0)
    manager.load_snapshot_reader.close()
    stale_files = [Path(manager.load_snapshot_reader.path)]
    names = (getattr(engine.port_args, name) for name in vars(engine.port_args))
    stale_files += [Path(name.removeprefix(IPC)) for name in names if isinstance(name, str) and name.startswith(IPC)]
    for file in stale_files:
        with contextlib.suppress(OSError):
            file.unlink()
