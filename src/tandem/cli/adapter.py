"""`tandem adapter`: loads and unloads adapters through a registry, and prints what became of them at each worker."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.cli.membership import Membership, ask_all
from tandem.cli.tables import print_columns
from tandem.client.adapter_calls import load_adapter, unload_adapter
from tandem.errors import AdapterRefused, StartError
from tandem.rpc.convert import ROLE_BY_NUMBER
from tandem.tls.paths import Tls

COLUMNS = ("ADAPTER", "MODEL", "WEIGHTS", "PREFILL", "DECODE", "AGGREGATED", "MISSING AT")
DIGEST_CHARS = 12
"""Of a digest in a table."""


async def load(name: str, path: str, model: str | None, registries: Sequence[str], tls: Tls | None) -> int:
    """Load an adapter on all workers of a model. Returns the exit status.

    Raises:
        TandemError: it was not loaded; no worker has it that did not have it before.
    """
    try:
        response = await load_adapter(await _live(registries, tls), name, path, model=model, tls=tls)
    except AdapterRefused as problem:
        _print_states(problem)
        raise
    _print(response.workers)
    print(f"{name}: served as a model, on {len(response.workers)} workers of {response.model}")
    return 0


async def unload(name: str, registries: Sequence[str], tls: Tls | None) -> int:
    """Unload an adapter on all workers. Returns the exit status.

    Raises:
        TandemError: it is served as before, or a worker did not release it.
    """
    try:
        response = await unload_adapter(await _live(registries, tls), name, tls=tls)
    except AdapterRefused as problem:
        _print_states(problem)
        raise
    _print(response.workers)
    print(f"{name}: unloaded from {len(response.workers)} workers")
    return 0


async def show(registries: Sequence[str], console: Console, *, as_json: bool, tls: Tls | None = None) -> int:
    """Print the adapters that workers serve, and the workers that lack one."""
    found = _found(await ask_all(registries, tls))
    if as_json:
        print(json.dumps(found, indent=2))
    elif not found:
        print("no adapters")
    else:
        print_columns(console, COLUMNS, [_row(entry) for entry in found])
    return 0


def _found(fleet: Membership) -> list[dict[str, object]]:
    """One entry for each model, adapter and set of weights, ordered."""
    workers = [entry.worker for entry in fleet.workers]
    keys = sorted({(one.name, worker.capabilities.model, one.digest) for worker in workers for one in worker.adapters})
    found = []
    for name, model, digest in keys:
        of_model = [worker for worker in workers if worker.capabilities.model == model]
        with_it = {one.worker_id for one in of_model if (name, digest) in {(a.name, a.digest) for a in one.adapters}}
        entry: dict[str, object] = {"adapter": name, "model": model, "digest": digest}
        for role in ("prefill", "decode", "aggregated"):
            entry[role] = [
                one.worker_id for one in of_model if one.worker_id in with_it and ROLE_BY_NUMBER[one.role].value == role
            ]
        entry["missing"] = [one.worker_id for one in of_model if one.worker_id not in with_it]
        found.append(entry)
    return found


def _row(entry: dict[str, object]) -> tuple[str, ...]:
    counts = [str(len(entry[role])) for role in ("prefill", "decode", "aggregated")]  # type: ignore[arg-type]
    missing = " ".join(entry["missing"]) or "-"  # type: ignore[arg-type]
    return str(entry["adapter"]), str(entry["model"]), str(entry["digest"])[:DIGEST_CHARS], *counts, missing


def _print(workers: Sequence[pb.AdapterAtWorker]) -> None:
    for each in workers:
        what = pb.AdapterOutcome.Name(each.outcome).removeprefix("ADAPTER_OUTCOME_").lower()
        print(f"{each.worker_id}: {what}, {each.duration.ToNanoseconds() / 1e9:.3f} s")


def _print_states(problem: AdapterRefused) -> None:
    for part in filter(None, problem.metadata.get("workers", "").split(",")):
        worker_id, _, state = part.partition("=")
        print(f"{worker_id}: {state.lower().replace('_', ' ')}", flush=True)


async def _live(registries: Sequence[str], tls: Tls | None) -> str:
    """A registry that can change adapters."""
    found = next((one.address for one in (await ask_all(registries, tls)).responses if one.is_live), None)
    if found is None:
        raise StartError("no registry has a live view: adapters are changed only on one")
    return found
