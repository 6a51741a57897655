"""The adapters of one model as this frontend sees them: routes and requests of each, on workers that the model shares.

Owns when an adapter's routes begin and end. Queue, capacity, costs, breakers, caches and tokenizer are the model's: its
adapters compete for the same workers.
"""

from __future__ import annotations

from collections.abc import Callable

from tandem.domain.worker import Worker
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.routing.adapter_view import AdapterView


class AdapterFleet:
    """The workers of one adapter, and the execution of its requests."""

    def __init__(self, view: AdapterView, execution: ExecutionDeps) -> None:
        self.view = view
        self.execution = execution


class AdapterFleets:
    """All adapters of one model."""

    def __init__(self, make: Callable[[AdapterView], ExecutionDeps]) -> None:
        """`make` makes the execution of an adapter's requests, on the workers of its view."""
        self._make = make
        self._fleets: dict[str, AdapterFleet] = {}
        self._workers: tuple[Worker, ...] = ()

    @property
    def served(self) -> list[AdapterFleet]:
        """The adapters that any worker serves, ordered by name."""
        return [self._fleets[name] for name in sorted(self._fleets) if self._fleets[name].view.workers]

    def find(self, name: str) -> AdapterFleet | None:
        """The adapter of that name; None: no worker serves it."""
        found = self._fleets.get(name)
        return found if found is not None and found.view.workers else None

    def follow(self, workers: tuple[Worker, ...]) -> bool:
        """Apply a new view of the model's workers. Returns whether any adapter's routes have changed."""
        if workers == self._workers:
            return False
        self._workers = workers
        for name in {adapter.name for worker in workers for adapter in worker.adapters} - self._fleets.keys():
            view = AdapterView(name)
            self._fleets[name] = AdapterFleet(view, self._make(view))
        changed = [fleet for fleet in self._fleets.values() if fleet.view.follow(workers)]
        for fleet in changed:
            fleet.execution.routes.follow(fleet.view.workers)
        for name, fleet in [*self._fleets.items()]:
            # Open requests of one that was unloaded must still hear of restarted workers.
            if not fleet.view.workers and not fleet.execution.open:
                del self._fleets[name]
        return bool(changed)

    def act(self) -> None:
        """Act on the new view: fail the attempts that it shows as lost, and wake the requests that wait for it."""
        for fleet in self._fleets.values():
            fleet.execution.notice(self._workers)
