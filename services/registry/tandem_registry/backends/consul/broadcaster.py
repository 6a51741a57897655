"""The view that watchers are told: Consul's, unless Consul seems to have lost what the registry still knows.

Owns the published fleet and the rule by which an answer is held back. How answers come is `query`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from tandem_registry.backends.consul.snapshot import ConsulSnapshot, Key, change_between
from tandem_registry.backends.subscriptions import Subscriptions
from tandem_registry.view import Origin, RemovalReason, View

log = logging.getLogger(__name__)


class Broadcaster:
    """What watchers hold."""

    def __init__(self, subscriptions: Subscriptions, now_s: float) -> None:
        """`now_s` is in seconds since the Unix epoch, as everywhere here."""
        self.registry_id: str | None = None
        """None: nothing was published yet."""
        self.observed = ConsulSnapshot()
        self.origin = Origin(is_live=False, since_s=now_s)
        self._subscriptions = subscriptions
        self._snapshot: View | None = None
        self._is_holding = False

    def lost(self, now_s: float) -> None:
        """Consul does not answer: the view is the last known one from now on."""
        self._set_live(False, now_s)

    def missing(self, registry_id: str, observed: ConsulSnapshot, own_keys: Collection[Key]) -> list[Key]:
        """Published members that an answer has no entry of, or that of a former start, although nobody can have taken
        them out: all of them in a new generation, and those whose leases are kept here in the present one. Once
        somebody is missing, everybody is waited for.
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
        """Let this be the view, and tell the difference."""
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
        """The last view stays, although Consul answers."""
        self._is_holding = True
        self._set_live(False, now_s)

    def snapshot(self) -> View:
        """The view without ages of leases; made once for each revision."""
        assert self.registry_id is not None, "snapshot() before publish()"
        if self._snapshot is None:
            self._snapshot = self.observed.view(self.registry_id)
        return self._snapshot

    def _set_live(self, is_live: bool, now_s: float) -> None:
        if is_live != self.origin.is_live:
            self.origin = Origin(is_live, now_s)
