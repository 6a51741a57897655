"""Consul's JSON of a service with its health, as entries. What was read once is not read again.

Owns the form of the answer, and the one line of log for an entry that cannot be read. What entries mean is `observed`.
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
"""Between two instances, and nowhere else: in a string its quotation marks would have backslashes, and no other object
begins with a Node that is an object."""
LAST = b"}]"


class AnswerReader:
    """Reads one answer after another. The same text is always the same entry, so an entry that did not change costs a
    look into a table: a thousand of them are two megabytes, and reading them all takes longer than anything else here.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Entry | None] = {}
        """Of the last answer, by the text of an instance; None: none of ours."""

    def entries(self, body: bytes) -> list[Entry]:
        """The entries that are ours and whole.

        Raises:
            ServiceError: this is no answer of Consul.
        """
        try:
            return self._entries(body)
        except (ValueError, KeyError, TypeError) as problem:
            raise ServiceError(f"Consul's answer cannot be read: {problem!r}") from None

    def _entries(self, body: bytes) -> list[Entry]:
        texts, known = _texts(body), self._known
        if texts is None:
            return [entry for instance in json.loads(body) if (entry := _entry(instance)) is not None]
        now = self._known = {text: known[text] if text in known else _entry(_instance(text)) for text in texts}
        return [entry for text in texts if (entry := now[text]) is not None]


def _texts(body: bytes) -> list[bytes] | None:
    """The text of each instance, without what all of them begin and end with; None: the form is another one."""
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
        log.warning("%s at %s is ignored: %s", service["ID"], node, problem)
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
    """An agent that was restarted says critical of everything until it has looked: with no word about why."""
    return check["Status"] == "critical" and bool(check["Output"] or check["Notes"])
