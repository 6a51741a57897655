"""The quota of a tenant: its fields, as a keys file writes them and as the edge passes them on with the client's id;
and what one process has used of it.

Owns both spellings. `tandem_frontend.admission.quotas` enforces a quota; the edge only forwards it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

PER_MINUTE_MAX = 1_000_000_000
OPEN_MAX = 100_000
LIMITS = {"requests_per_minute": PER_MINUTE_MAX, "tokens_per_minute": PER_MINUTE_MAX, "open_requests": OPEN_MAX}
NUMBER = re.compile(r"[0-9]{1,10}")
SEPARATOR = ";"
"""Between a client's id and each field. No client id of a keys file contains it."""


class QuotaError(ValueError):
    """A field of a quota is wrong; `str()` names it, and never repeats what is not a field's name."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may use of a cluster; None: without a limit."""

    requests_per_minute: int | None = None
    """Each choice of a request counts as one."""
    tokens_per_minute: int | None = None
    """Of prompts, cached ones included, and of completions."""
    open_requests: int | None = None
    """At a time; each choice counts as one."""

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self != NO_QUOTA


@dataclass(frozen=True, slots=True)
class Spending:
    """What one process, since its start, has admitted of a tenant: sums that only grow, and what is open now."""

    source: str
    """The process and its start."""
    tenant: str
    requests: int
    tokens: int
    open_requests: int
    requests_left: float
    """In its bucket of a minute; negative: owed; infinite: no limit."""
    tokens_left: float


NO_QUOTA = Quota()
QUOTA_HEADERS = (
    *(f"x-ratelimit-{state}-{of}" for of in ("requests", "tokens") for state in ("limit", "remaining", "reset")),
    "x-ratelimit-limit-open-requests",
    "x-ratelimit-remaining-open-requests",
)
"""What shows a client the state of its quota, with OpenAI's names where OpenAI has one."""
NAMES = tuple(field.name for field in fields(Quota))


def parse_quota(words: Iterable[str]) -> Quota:
    """A quota of its fields, each `name=number`.

    Raises:
        QuotaError: one is unknown, repeated, no number or out of range.
    """
    found: dict[str, int] = {}
    for number, word in enumerate(words, 1):
        name, equals, text = word.partition("=")
        if not equals or name not in NAMES:
            # Not shown: it may be a part of a key.
            raise QuotaError(f"field {number} after the key is not one of {', '.join(NAMES)}, with =NUMBER behind it")
        if name in found:
            raise QuotaError(f"{name} is given twice")
        if not NUMBER.fullmatch(text) or not 1 <= int(text) <= LIMITS[name]:
            raise QuotaError(f"{name} must be 1 to {LIMITS[name]}")
        found[name] = int(text)
    return Quota(**found)


def client_header(client_id: str, quota: Quota) -> str:
    """The client's id with its quota, as the edge sends it to frontends: `id`, or `id;name=number;...`."""
    given = ((name, getattr(quota, name)) for name in NAMES)
    return SEPARATOR.join((client_id, *(f"{name}={value}" for name, value in given if value is not None)))


def read_client_header(text: str) -> tuple[str, Quota]:
    """The inverse of `client_header`. Fields that this release does not know are ignored: the edge may be newer.

    Raises:
        QuotaError: a known field is repeated, no number or out of range.
    """
    client_id, *words = text.split(SEPARATOR)
    known = (word for word in words if word.partition("=")[0] in NAMES)
    return client_id, parse_quota(known)
