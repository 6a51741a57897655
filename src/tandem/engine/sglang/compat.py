"""Checks at start that the installed SGLang is the one this adapter was written for; fails with one sentence.

Three checks: installed versions, before SGLang is imported; the names this adapter calls or hooks, after; and, once the
scheduler is up, that the hooks are applied there, because SGLang only logs a hook that fails to apply.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib import metadata
from typing import Any

from tandem.engine.sglang.environment import PLATFORM_NAME
from tandem.engine.sglang.hooks import scheduler_hooks
from tandem.errors import StartError

SGLANG_VERSION = "0.5.23"
GENERATE_ARGUMENTS = (
    "input_ids",
    "sampling_params",
    "stream",
    "rid",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "return_logprob",
    "top_logprobs_num",
    "logprob_start_len",
    "priority",
    "cache_salt",
    "lora_path",
    "external_trace_header",
)
EMBEDDING_ARGUMENTS = ("input_ids", "rid", "dimensions", "priority", "external_trace_header")
MANAGER_METHODS = (
    "abort_request",
    "handle_loop",
    "flush_cache",
    "start_profile",
    "stop_profile",
    "set_internal_state",
    "pd_role_switch",
    # Called or overridden by `front_half`.
    "_handle_batch_output",
    "_handle_abort_req",
    "_init_req_state",
    "_release_req_states_on_failure",
    "_send_one_request",
    "_set_default_priority",
    "_tokenize_one_request",
    "_validate_and_resolve_lora",
    "_release_lora_once",
    "unload_lora_adapter",
    "convert_to_span_attrs",
)
ENTRY_POINTS = (("sglang.srt.platforms", PLATFORM_NAME), ("sglang.srt.plugins", "tandem_hooks"))
INSTALL = 'in a checkout of Tandem run `make setup`, or `pip install ".[sglang]"` on a GPU machine'

CHANGED = "this SGLang was changed or is not the tested one; reinstall it, and tandem (pip install -e . --no-deps)"


def check_installed(transfer_backend: str) -> None:
    """Check the installed distributions, without importing any.

    Raises:
        StartError: a distribution or entry point is missing, or SGLang is not the pinned version.
    """
    version = _version("sglang")
    if version is None:
        raise StartError(f"sglang is not installed: {INSTALL}")
    if version != SGLANG_VERSION:
        raise StartError(f"sglang is version {version}, but this worker needs {SGLANG_VERSION}: {INSTALL}")
    if _version("torch") is None:
        raise StartError(f"torch is not installed: {INSTALL}")
    if transfer_backend == "nixl" and _version("nixl") is None:
        raise StartError(f"transfer_backend: is nixl, but nixl is not installed: {INSTALL}")
    for group, name in ENTRY_POINTS:
        if not metadata.entry_points(group=group, name=name):
            raise StartError(
                f"entry point {name} of group {group} is missing: reinstall tandem (pip install -e . --no-deps)"
            )


def check_offers(transfer_backend: str, device: str) -> None:
    """Import SGLang and check for every name this adapter calls or hooks.

    Raises:
        StartError: a module cannot be imported, or a name is missing.
    """
    _import("sglang.srt.entrypoints.engine")
    manager = _import("sglang.srt.managers.tokenizer_manager").TokenizerManager
    messages = _import("sglang.srt.managers.io_struct")
    for kind, names in (("GenerateReqInput", GENERATE_ARGUMENTS), ("EmbeddingReqInput", EMBEDDING_ARGUMENTS)):
        accepted = inspect.signature(getattr(messages, kind)).parameters
        missing = [name for name in names if name not in accepted]
        if missing:
            raise StartError(f"sglang {SGLANG_VERSION}: {kind} has no {', '.join(missing)}: {CHANGED}")
    for name in MANAGER_METHODS:
        if not hasattr(manager, name):
            raise StartError(f"sglang {SGLANG_VERSION}: TokenizerManager has no {name}: {CHANGED}")
    if transfer_backend == "nixl":
        _import("nixl._api")
        if device == "cpu":
            # The digest of what is handed over.
            _import("xxhash")
        for target in scheduler_hooks.targets(device) | scheduler_hooks.targets_in_main():
            try:
                pkgutil.resolve_name(target)
            except (ImportError, AttributeError) as problem:
                raise StartError(f"sglang {SGLANG_VERSION}: cannot hook {target}: {problem}; {CHANGED}") from None


def check_hooks(facts: dict[str, Any] | None, device: str) -> None:
    """Compare the hooks that the scheduler reports, and those of this process, with those expected on this device.

    Raises:
        StartError: the plugin did not run in the scheduler, or a hook is not applied.
    """
    if facts is None:
        raise StartError(
            "SGLang's scheduler did not load Tandem's plugin: reinstall tandem (pip install -e . --no-deps)"
        )
    absent = sorted(set(scheduler_hooks.targets(device)) - set(facts["hooks"]))
    if absent:
        raise StartError(f"hooks were not applied in SGLang's scheduler: {', '.join(absent)}; {CHANGED}")
    here = list(scheduler_hooks.targets_in_main())
    absent = sorted(set(here) - set(scheduler_hooks.in_place(here)))
    if absent:
        raise StartError(f"hooks were not applied in the worker's process: {', '.join(absent)}; {CHANGED}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as problem:  # an import runs the module's code, which may raise anything
        raise StartError(f"{name} cannot be imported: {type(problem).__name__}: {problem}") from None
