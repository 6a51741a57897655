"""The rule: whether a worker should take another role now, which one, and why not otherwise.

Pure: time comes with the observations. Owns the limits: a live view, whole figures, one step at a time, never below one
worker of a role, a gain that lasts, a pause after each step, and few reversals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.controller.figures import Observation, SeenWorker
from tandem.controller.needs import NeedMeter, Needs, NeedSettings
from tandem.domain.decision import Why
from tandem.domain.worker import Start, WorkerRole, WorkerState

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
REFUSED_S = 60.0
QUIET = 8
DOUBLED_MAX = 4
"""How often the pause of a reversal is doubled at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now."""

    why: Why
    words: str
    """The reason, for people."""
    start: Start | None = None
    """The start of the worker that should change; None: nothing should."""
    role: WorkerRole | None = None
    """The role it should take."""
    needs: Needs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSettings:
    """Goals and limits."""

    needs: NeedSettings
    act_above: float
    """Share of the workers of a role that the load needs, from which on a change is considered."""
    gain_min: float
    """By which share the larger need for each worker must fall."""
    confirm_s: float
    """For how long a change must be wanted."""
    settle_s: float
    """After a change, before the next one."""
    reversal_s: float
    """After a change, before one in the other direction; from a second reversal on, twice as long each time."""


class RoleRule:
    """Decides for one model. One instance for each process or replay; keeps what it has seen."""

    def __init__(self, settings: RuleSettings) -> None:
        self._settings = settings
        self._meter = NeedMeter(settings.needs)
        self._wanted: WorkerRole | None = None
        """The role that a change would give, as long as it has been wanted without a pause."""
        self._wanted_since_s = 0.0
        self._last_role: WorkerRole | None = None
        """The role that the last change gave."""
        self._last_s = -math.inf
        self._reversals_count = 0
        """Since the last pause of `QUIET` times the pause of a reversal."""
        self._roles: dict[str, WorkerRole] = {}
        """The last known role of each worker."""
        self._homes: dict[str, WorkerRole] = {}
        """The role that each worker took without a decision of this rule: with which it starts, as far as known."""
        self._given: dict[str, WorkerRole] = {}
        """Roles that this rule has decided on, until the worker has them."""
        self._refused: dict[Start, float] = {}

    def decide(self, now: Observation) -> Decision:
        """Decide on one observation. Call it at a steady interval."""
        self._note_changes(now)
        decision = self._blocked(now)
        if decision is None:
            needs = self._meter.add(now)
            decision = self._no_figures() if needs is None else self._weighed(now, needs)
        if decision.start is not None and decision.role is not None:
            self._given[decision.start[0]] = decision.role
        if decision.why not in (Why.CHANGE, Why.UNCONFIRMED, Why.SETTLING, Why.REVERSAL, Why.CANNOT_TAKE):
            self._wanted = None
        return decision

    def refused(self, start: Start, at_s: float) -> None:
        """The change of a worker was refused, or failed: another one is chosen for a while."""
        self._refused[start] = at_s
        self._given.pop(start[0], None)
        self._wanted = None

    def _note_changes(self, now: Observation) -> None:
        """Find the changes that have ended since the last observation, also those by an operator.

        A worker that is back in its first role without a decision has restarted: that says nothing of the load.
        """
        roles = {one.worker.worker_id: one.worker.role for one in now.workers}
        for worker_id, role in roles.items():
            is_decided = self._given.get(worker_id) is role
            if self._roles.get(worker_id, role) is not role:
                self._given.pop(worker_id, None)
                if is_decided or self._homes.get(worker_id) is not role:
                    self._changed(role, now.at_s)
                self._wanted = None
                self._meter.restart()
            if not is_decided and self._roles.get(worker_id) is not role:
                self._homes[worker_id] = role
        # A worker that is away while it changes is compared once it is back.
        self._roles |= roles
        self._refused = {one: at_s for one, at_s in self._refused.items() if now.at_s - at_s < REFUSED_S}

    def _changed(self, role: WorkerRole, at_s: float) -> None:
        quiet_s, self._last_s = at_s - self._last_s, at_s
        if role not in (PREFILL, DECODE):
            # It is neither one direction nor the other.
            return
        if self._last_role is not None and role is not self._last_role:
            count = 0 if quiet_s > QUIET * self._settings.reversal_s else self._reversals_count + 1
            self._reversals_count = min(count, DOUBLED_MAX)
        self._last_role = role

    # --- Limits that come before the load

    def _blocked(self, now: Observation) -> Decision | None:
        if not now.is_live:
            self._meter.restart()
            return Decision(why=Why.STALE_VIEW, words="the registry's view is the last known one: no role is changed")
        leaving = [one for one in now.workers if one.worker.state is not WorkerState.SERVING]
        if leaving:
            self._meter.restart()
            names = ", ".join(one.worker.worker_id for one in leaving)
            return Decision(why=Why.IN_PROGRESS, words=f"{names} drains: one step at a time")
        if now.traffic is None or any(one.load is None for one in now.workers):
            silent = [one.worker.worker_id for one in now.workers if one.load is None] or ["a frontend"]
            self._meter.restart()
            return self._no_figures(f"{', '.join(silent)} reports no load")
        if not all(self._of(now, role) for role in (PREFILL, DECODE)):
            return Decision(why=Why.NO_PAIR, words="there is no pair of a prefill and a decode worker")
        return None

    @staticmethod
    def _no_figures(words: str = "the window is too short yet") -> Decision:
        return Decision(why=Why.NO_FIGURES, words=words)

    @staticmethod
    def _of(now: Observation, role: WorkerRole) -> list[SeenWorker]:
        return [one for one in now.workers if one.worker.role is role]

    # --- The load

    def _weighed(self, now: Observation, needs: Needs) -> Decision:
        prefill, decode = len(self._of(now, PREFILL)), len(self._of(now, DECODE))
        present = max(needs.prefill / prefill, needs.decode / decode)
        seen = f"needs {needs.prefill:.1f} prefill and {needs.decode:.1f} decode workers, has {prefill} and {decode}"
        words = f"{seen} ({needs.words})"
        if present <= self._settings.act_above:
            return Decision(why=Why.WITHIN, words=f"the roles fit the load: {words}", needs=needs)
        role = PREFILL if needs.prefill / prefill > needs.decode / decode else DECODE
        giving, taking = (decode, prefill) if role is PREFILL else (prefill, decode)
        need_giving, need_taking = (needs.decode, needs.prefill) if role is PREFILL else (needs.prefill, needs.decode)
        if giving == 1:
            other = DECODE if role is PREFILL else PREFILL
            return Decision(
                why=Why.LAST_WORKER, words=f"the last {other.value} worker keeps its role: {words}", needs=needs
            )
        after = max(need_giving / (giving - 1), need_taking / (taking + 1))
        if after > present * (1 - self._settings.gain_min):
            return Decision(why=Why.NO_GAIN, words=f"another split would not help: {words}", needs=needs)
        return self._timed(now, role, needs, words)

    def _timed(self, now: Observation, role: WorkerRole, needs: Needs, words: str) -> Decision:
        if self._wanted is not role:
            self._wanted, self._wanted_since_s = role, now.at_s
        wanted_s = now.at_s - self._wanted_since_s
        since_s = now.at_s - self._last_s
        towards = f"one more {role.value} worker is wanted"
        if since_s < self._settings.settle_s:
            return Decision(
                why=Why.SETTLING, words=f"{towards}, {since_s:.0f} s after the last change: {words}", needs=needs
            )
        pause_s = self._settings.reversal_s * 2**self._reversals_count
        if self._last_role not in (None, role) and since_s < pause_s:
            limit = f"a reversal has to wait for {pause_s:g} s"
            return Decision(
                why=Why.REVERSAL,
                words=f"{towards}, {since_s:.0f} s after the last change, {limit}: {words}",
                needs=needs,
            )
        if wanted_s < self._settings.confirm_s:
            return Decision(why=Why.UNCONFIRMED, words=f"{towards}, for {wanted_s:.0f} s so far: {words}", needs=needs)
        return self._chosen(now, role, needs, words)

    def _chosen(self, now: Observation, role: WorkerRole, needs: Needs, words: str) -> Decision:
        """The worker with the least to drain."""
        giving = self._of(now, DECODE if role is PREFILL else PREFILL)
        able = [one for one in giving if role in one.roles and one.worker.start not in self._refused]
        if not able:
            return Decision(
                why=Why.CANNOT_TAKE, words=f"no worker can take the role {role.value} now: {words}", needs=needs
            )
        chosen = min(able, key=lambda one: (_open_work(one), one.worker.worker_id))
        who = f"{chosen.worker.worker_id} takes the role {role.value}"
        return Decision(why=Why.CHANGE, words=f"{who}: {words}", start=chosen.worker.start, role=role, needs=needs)


def _open_work(one: SeenWorker) -> int:
    load = one.load
    assert load is not None, "checked before"
    return (load.running_requests or 0) + (load.waiting_requests or 0) + (load.transferring_requests or 0)
