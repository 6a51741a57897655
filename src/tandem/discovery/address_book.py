"""Which registry to call: caches DNS results, and moves on to another address when one fails.

Owns the order of addresses and the last DNS results. Calls no registry and does not wait between attempts.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from tandem.clock import Clock, monotonic
from tandem.discovery.addresses import SrvName, parse_srv
from tandem.discovery.srv_lookup import resolve_srv
from tandem.errors import ServiceError

log = logging.getLogger(__name__)

FRESH_S = 1.0
"""A DNS result older than this is looked up again at the next failure."""
DNS_RETRY_S = 5.0
"""After a failed lookup the cached addresses are used without another one for this long: each may take a second."""

Resolve = Callable[[SrvName, random.Random], Awaitable[tuple[str, ...]]]


class AddressBook:
    """The addresses of one setting. For one caller; not for concurrent calls."""

    def __init__(
        self,
        forms: Sequence[str],
        *,
        clock: Clock = monotonic,
        rng: random.Random | None = None,
        resolve: Resolve = resolve_srv,
    ) -> None:
        """Makes no lookup yet.

        Args:
            forms: host:port or srv://..., in the formats of `tandem.discovery.addresses`.
            clock: for the age of DNS results.
            rng: spreads callers over registries of equal DNS priority.
            resolve: looks up SRV records.
        """
        assert forms, "an address book needs an address"
        self._forms = [(form, parse_srv(form)) for form in forms]
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._resolve = resolve
        self._known: dict[str, tuple[str, ...]] = {}
        """The last non-empty result for each name: a failed or empty lookup does not prove that a registry is gone."""
        self._failing: set[str] = set()
        """Names whose last lookup failed; the failure is logged once."""
        self._addresses: tuple[str, ...] = ()
        self._next_lookup_s = 0.0
        self._failure_count = 0
        self._failed_at: dict[str, int] = {}
        """By address: number of its last failure, for the order of attempts."""
        self._current: str | None = None

    def __str__(self) -> str:
        """The current address, for log lines."""
        return self._current or ", ".join(form for form, _ in self._forms)

    @property
    def count(self) -> int:
        """Number of known addresses, at least 1."""
        return max(1, len(self._addresses))

    async def current(self) -> str:
        """The address to call: the same one until `failed` is called.

        Raises:
            ServiceError: all addresses are names, and none has ever been resolved.
        """
        if self._current is None:
            if not self._addresses or self._clock() >= self._next_lookup_s:
                await self._look_up()
            # Addresses that never failed come first, in the given order; then the one whose failure is oldest.
            self._current = min(self._addresses, key=lambda address: self._failed_at.get(address, 0))
        return self._current

    def failed(self) -> None:
        """Report a failure of the current address: `current` returns another one next, if there is one."""
        if self._current is not None:
            self._failure_count += 1
            self._failed_at[self._current] = self._failure_count
            self._current = None

    async def _look_up(self) -> None:
        self._next_lookup_s = self._clock() + FRESH_S
        found: list[str] = []
        for form, srv in self._forms:
            found.extend([form] if srv is None else await self._resolved(form, srv))
        if not found:
            raise ServiceError(f"could not resolve {self} yet")
        self._addresses = tuple(dict.fromkeys(found))
        self._failed_at = {address: at for address, at in self._failed_at.items() if address in self._addresses}

    async def _resolved(self, form: str, srv: SrvName) -> tuple[str, ...]:
        try:
            self._known[form] = await self._resolve(srv, self._rng)
            self._failing.discard(form)
        except ServiceError as problem:
            if form not in self._failing:
                log.warning("%s; using the last known addresses: %s", problem, self._known.get(form, "none"))
                self._failing.add(form)
            self._next_lookup_s = self._clock() + DNS_RETRY_S
        return self._known.get(form, ())
