"""Which registry to call next: keeps what DNS said, goes on to another address when one fails.

Owns the order of addresses and the last answers of DNS. Makes no call to a registry and does not wait between tries.
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
"""An answer of DNS is asked for again at the first failure after this."""
DNS_RETRY_S = 5.0
"""So long what is known is used without asking, after DNS has failed: each question may cost a second."""

Resolve = Callable[[SrvName, random.Random], Awaitable[tuple[str, ...]]]


class AddressBook:
    """The addresses behind a setting. One owner; its calls come one after the other."""

    def __init__(
        self,
        forms: Sequence[str],
        *,
        clock: Clock = monotonic,
        rng: random.Random | None = None,
        resolve: Resolve = resolve_srv,
    ) -> None:
        """Asks nothing yet.

        Args:
            forms: host:port or srv://..., as `tandem.discovery.addresses` reads them.
            clock: for the age of answers.
            rng: spreads callers over registries that DNS holds for equal.
            resolve: asks DNS.
        """
        assert forms, "an address book needs an address"
        self._forms = [(form, parse_srv(form)) for form in forms]
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 -- spreads load, protects nothing
        self._resolve = resolve
        self._known: dict[str, tuple[str, ...]] = {}
        """The last good answer for each name: one that does not come, or that is empty, is no proof of absence."""
        self._unanswered: set[str] = set()
        """Names DNS did not answer for the last time; told once."""
        self._addresses: tuple[str, ...] = ()
        self._ask_again_s = 0.0
        self._failure_count = 0
        self._failed_at: dict[str, int] = {}
        """By address: which failure was its last."""
        self._current: str | None = None

    def __str__(self) -> str:
        """What is called now, for a log."""
        return self._current or ", ".join(form for form, _ in self._forms)

    @property
    def count(self) -> int:
        """How many addresses there are, as far as is known."""
        return max(1, len(self._addresses))

    async def current(self) -> str:
        """The address to call: the same one until it has `failed`.

        Raises:
            ServiceError: there are only names, and DNS has never answered for them.
        """
        if self._current is None:
            if not self._addresses or self._clock() >= self._ask_again_s:
                await self._look_up()
            # Whoever has failed goes behind all others; whoever never did is first, in the order given.
            self._current = min(self._addresses, key=lambda address: self._failed_at.get(address, 0))
        return self._current

    def failed(self) -> None:
        """The current address did not work: another one is next, where there is one."""
        if self._current is not None:
            self._failure_count += 1
            self._failed_at[self._current] = self._failure_count
            self._current = None

    async def _look_up(self) -> None:
        self._ask_again_s = self._clock() + FRESH_S
        found: list[str] = []
        for form, srv in self._forms:
            found.extend([form] if srv is None else await self._answer(form, srv))
        if not found:
            raise ServiceError(f"DNS has not said yet what {self} is")
        self._addresses = tuple(dict.fromkeys(found))
        self._failed_at = {address: at for address, at in self._failed_at.items() if address in self._addresses}

    async def _answer(self, form: str, srv: SrvName) -> tuple[str, ...]:
        try:
            self._known[form] = await self._resolve(srv, self._rng)
            self._unanswered.discard(form)
        except ServiceError as problem:
            if form not in self._unanswered:
                log.warning("%s; going on with what is known of it: %s", problem, self._known.get(form, "nothing"))
                self._unanswered.add(form)
            self._ask_again_s = self._clock() + DNS_RETRY_S
        return self._known.get(form, ())
