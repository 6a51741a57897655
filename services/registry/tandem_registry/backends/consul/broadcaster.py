"""The view that is published to watchers: Consul's, unless Consul seems to have lost members that are known here.

Owns the published snapshot and the rule by which a new one is held back. `blocking_query` delivers the snapshots.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from tandem_registry.backends.consul.snapshot import ConsulSnapshot, Key, change_between
from tandem_registry.backends.subscriptions import Subscriptions
from tandem_registry.view import Origin, RemovalReason, View

log = logging.getLogger(__name__)


class Broadcaster:
    """Publishes snapshots of Consul to the watchers."""

    def __init__(self, subscriptions: Subscriptions, now_s: float) -> None:
        """`now_s` is in seconds since the Unix epoch, as everywhere here."""
        self.registry_id: str | None = None
        """None: nothing has been published yet."""
        self.observed = ConsulSnapshot()
        self.origin = Origin(is_live=False, since_s=now_s)
        self._subscriptions = subscriptions
        self._snapshot: View | None = None
        self._is_holding = False

    def lost(self, now_s: float) -> None:
        """Mark the view as last known: Consul is unreachable."""
        self._set_live(False, now_s)

    def missing(self, registry_id: str, observed: ConsulSnapshot, own_keys: Collection[Key]) -> list[Key]:
        """Published members that a snapshot lacks, or shows only in an older incarnation, although no registry removed
        them: any member in a new generation of Consul's data, and in the current one those whose leases this replica
        owns. While a snapshot is held back, any member counts as missing.
        """
        if self.registry_id is None:
            return []
        absent = [
            key
            for key, entry in self.observed.members.items()
            if key not in observed.winners or observed.winners[key].record.member.epoch < entry.record.member.epoch
        ]
        if registry_id != self.registry_id or any(key in own_keys for key in absent) or self._is_holding:
            return absent
        return []

    def publish(
        self,
        registry_id: str,
        observed: ConsulSnapshot,
        reasons: Mapping[tuple[str, str, int], RemovalReason],
        now_s: float,
    ) -> None:
        """Make this the view, and publish the difference to watchers."""
        before, self.observed = self.observed, observed
        self._snapshot, self._is_holding = None, False
        is_new, is_first = registry_id != self.registry_id, self.registry_id is None
        self.registry_id = registry_id
        self._set_live(True, now_s)
        if is_new:
            if not is_first:
                self._subscriptions.publish(self.snapshot())
        elif (change := change_between(before, observed, reasons)) is not None:
            self._subscriptions.publish(change)

    def hold(self, now_s: float) -> None:
        """Keep serving the last view although Consul responds, and mark it as last known."""
        self._is_holding = True
        self._set_live(False, now_s)

    def snapshot(self) -> View:
        """The view without lease ages; built once for each revision."""
        assert self.registry_id is not None, "snapshot() before publish()"
        if self._snapshot is None:
            self._snapshot = self.observed.view(self.registry_id)
        return self._snapshot

    def _set_live(self, is_live: bool, now_s: float) -> None:
        if is_live != self.origin.is_live:
            self.origin = Origin(is_live, now_s)
