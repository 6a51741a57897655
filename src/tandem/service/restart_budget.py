"""How often a process that has exited is restarted, and after which delays.

Owns the counting. The caller restarts, logs, and handles the last restart.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tandem.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Limit of restarts, and their delays."""

    count_max: int = 5
    """Maximum number of restarts within the window."""
    window_s: float = 600.0
    first_delay_s: float = 1.0
    """Delay of the first restart; doubles with each restart within the window."""


class RestartBudget:
    """The restarts of one process."""

    def __init__(self, policy: RestartPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._taken_s: deque[float] = deque()

    def take_delay_s(self) -> float | None:
        """Count a restart and return the delay before it, in seconds; None when the limit is reached."""
        now_s = self._clock()
        while self._taken_s and now_s - self._taken_s[0] > self._policy.window_s:
            self._taken_s.popleft()
        count = len(self._taken_s)
        if count >= self._policy.count_max:
            return None
        self._taken_s.append(now_s)
        return float(self._policy.first_delay_s * 2**count)
