"""The registries of the controller's settings: which one to call next.

Owns the lookup of names and the order; one that has failed is the last to be tried again.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from tandem.discovery.addresses import parse_srv
from tandem.discovery.srv_lookup import resolve_srv
from tandem.errors import TandemError

log = logging.getLogger(__name__)


class Registries:
    """The registries, one of which is in use."""

    def __init__(self, forms: Sequence[str]) -> None:
        """`forms`: host:port or srv://NAME, checked."""
        self._forms = forms
        self._rng = random.Random()  # noqa: S311 -- shuffles equal records, not a secret
        self.last: str | None = None
        """host:port of the one in use; None: none is known yet, or the last one failed."""
        self._failed: list[str] = []

    async def live(self) -> str | None:
        """The one in use, or the next one to use; None: DNS knows none."""
        if self.last is None:
            known = await self._known()
            self._failed = [address for address in self._failed if address in known]
            fresh = [address for address in known if address not in self._failed]
            self.last = next(iter([*fresh, *self._failed]), None)
        return self.last

    def failed(self, address: str) -> None:
        """A call failed: use another one."""
        self._failed = [one for one in self._failed if one != address] + [address]
        self.last = None

    async def _known(self) -> list[str]:
        found: list[str] = []
        for form in self._forms:
            srv = parse_srv(form)
            try:
                found += [form] if srv is None else await resolve_srv(srv, self._rng)
            except TandemError as problem:
                log.warning("cannot look up %s: %s", form, problem)
        return list(dict.fromkeys(found))
