"""Consul's JSON of a service with its health, as entries. What was read once is not read again.

Owns the form of the answer, and the one line of log for an entry that cannot be read. What entries mean is `fleet`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from tandem_registry.backends.consul.fleet import Entry
from tandem_registry.backends.consul.records import Record, Unreadable, record_of
from tandem_registry.view import Health

log = logging.getLogger(__name__)


class AnswerReader:
    """Reads one answer after another of one generation of Consul's data."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[int, Record | None]] = {}

    def forget(self) -> None:
        """Indexes begin anew."""
        self._known = {}

    def entries(self, answer: Iterable[dict[str, Any]]) -> list[Entry]:
        """The entries that are ours and whole."""
        known: dict[tuple[str, str], tuple[int, Record | None]] = {}
        found: list[Entry] = []
        for instance in answer:
            node, service = instance["Node"]["Node"], instance["Service"]
            place = (node, service["ID"])
            index = service["ModifyIndex"]
            read = self._known.get(place)
            if read is None or read[0] != index:
                read = (index, _read(node, service))
            known[place] = read
            if read[1] is not None:
                found.append(_entry(node, service["ID"], read[1], instance["Checks"]))
        self._known = known
        return found


def _read(node: str, service: dict[str, Any]) -> Record | None:
    try:
        return record_of(service["Address"], service["Port"], service["Meta"] or {})
    except Unreadable as problem:
        log.warning("%s at %s is ignored: %s", service["ID"], node, problem)
        return None


def _entry(node: str, service_id: str, record: Record, checks: list[dict[str, Any]]) -> Entry:
    health, is_node_alive = Health.UNKNOWN, True
    for check in checks:
        if not check["ServiceID"]:
            is_node_alive = is_node_alive and check["Status"] != "critical"
        elif _is_critical(check):
            health = Health.CRITICAL
        elif health is Health.UNKNOWN:
            health = Health.PASSING
    return Entry(node, service_id, record, health, is_node_alive)


def _is_critical(check: dict[str, Any]) -> bool:
    """An agent that was restarted says critical of everything until it has looked: with no word about why."""
    return check["Status"] == "critical" and bool(check["Output"] or check["Notes"])
