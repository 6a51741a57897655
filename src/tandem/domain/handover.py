"""Why an engine drops a message that reached a port of the KV hand-over."""

from __future__ import annotations

from enum import StrEnum


class DropReason(StrEnum):
    """Reasons, in the order in which a message is checked."""

    FOREIGN = "foreign"
    """No message of the hand-over: a scan, a scrape, another protocol."""
    MALFORMED = "malformed"
    """The wrong number of frames, a frame of the wrong length, or a number that cannot be read."""
    UNKNOWN_PEER = "unknown_peer"
    """From an engine that has not registered, or with another address than the registered one."""
    UNKNOWN_ROOM = "unknown_room"
    """A room without a request, the oldest of too many."""
    REFUSED = "refused"
    """A registration that the engine did not accept, or other pages for a room that already has some."""
