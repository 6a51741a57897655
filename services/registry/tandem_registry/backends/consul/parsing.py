"""Parses Consul's JSON of a service and its health into entries. Unchanged instances are not parsed again.

Owns the response format, and the log line for an entry that cannot be read. `snapshot` decides which entries count.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from tandem.errors import ServiceError
from tandem_registry.backends.consul.records import Record, Unreadable, record_of
from tandem_registry.backends.consul.snapshot import Entry
from tandem_registry.view import Health

log = logging.getLogger(__name__)

FIRST = b'[{"Node":{'
NEXT = b'},{"Node":{'
"""Separates two instances, and occurs nowhere else: in a string its quotation marks would be escaped, and no other
object begins with a Node that is an object."""
LAST = b"}]"


class ResponseReader:
    """Parses one response after another. Equal text is the same entry, so an unchanged instance costs one dictionary
    lookup: a thousand instances are two megabytes, and parsing all of them would dominate the cost of a change.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Entry | None] = {}
        """Entries of the last response, by the text of the instance; None: not written by a registry."""

    def entries(self, body: bytes) -> list[Entry]:
        """The valid entries written by registries.

        Raises:
            ServiceError: the body is not a Consul response.
        """
        try:
            return self._entries(body)
        except (ValueError, KeyError, TypeError) as problem:
            raise ServiceError(f"could not parse Consul's response: {problem!r}") from None

    def _entries(self, body: bytes) -> list[Entry]:
        texts, known = _texts(body), self._known
        if texts is None:
            return [entry for instance in json.loads(body) if (entry := _entry(instance)) is not None]
        now = self._known = {text: known[text] if text in known else _entry(_instance(text)) for text in texts}
        return [entry for text in texts if (entry := now[text]) is not None]


def _texts(body: bytes) -> list[bytes] | None:
    """The text of each instance, without the common beginning and end; None: the response has another format."""
    body = body.strip()
    if not body.startswith(FIRST) or not body.endswith(LAST):
        return None
    return body[len(FIRST) : -len(LAST)].split(NEXT)


def _instance(text: bytes) -> dict[str, Any]:
    instance: dict[str, Any] = json.loads(FIRST[1:] + text + LAST[:1])
    return instance


def _entry(instance: dict[str, Any]) -> Entry | None:
    node, service = instance["Node"]["Node"], instance["Service"]
    try:
        record = record_of(service["Address"], service["Port"], service["Meta"] or {})
    except Unreadable as problem:
        log.warning("ignored Consul entry %s at node %s: %s", service["ID"], node, problem)
        return None
    return _with_health(node, service["ID"], record, instance["Checks"])


def _with_health(node: str, service_id: str, record: Record, checks: list[dict[str, Any]]) -> Entry:
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
    """A restarted agent reports every check as critical until it has run it; those have neither output nor notes."""
    return check["Status"] == "critical" and bool(check["Output"] or check["Notes"])
