"""How often a process that has died is started again, and after which pauses.

Owns the counting. Which process it is, what is logged and what follows the last restart is the caller's business.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tandem.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How often a process is started again, and after which pauses."""

    count_max: int = 5
    """Within the window."""
    window_s: float = 600.0
    first_delay_s: float = 1.0
    """Doubles with each restart within the window."""


class RestartBudget:
    """The restarts of one process."""

    def __init__(self, policy: RestartPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._taken_s: deque[float] = deque()

    def take_delay_s(self) -> float | None:
        """The pause before the next restart, which counts from now on; None when there have been too many."""
        now_s = self._clock()
        while self._taken_s and now_s - self._taken_s[0] > self._policy.window_s:
            self._taken_s.popleft()
        count = len(self._taken_s)
        if count >= self._policy.count_max:
            return None
        self._taken_s.append(now_s)
        return float(self._policy.first_delay_s * 2**count)
