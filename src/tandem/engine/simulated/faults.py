"""Faults at named points of the simulated engine: which there are, when one fires, and the proof that it has.

Owns the rules and their counting, seeded, so that a run repeats. What an engine does when it crashes or has no memory
left is the machine's business.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tandem.engine.simulated.timing import Clock
from tandem.errors import ConfigError

ENGINE_POINTS = ("admit", "prefill_chunk", "decode_step", "finish", "abort")
"""Passed by the engine's own loop: what hangs there stops every request."""
LEG_POINTS = ("canary", "bootstrap", "transfer_begin", "transfer_middle", "transfer_end")
"""Passed by one request beside the loop: what hangs there stops that request."""
POINTS = (*ENGINE_POINTS, *LEG_POINTS)
KINDS = ("fail", "delay", "hang", "exhaust", "crash", "kill")
CONTROL_INTERVAL_S = 0.05


class FaultInjected(Exception):
    """A rule says that this request fails here."""


class EngineCrashed(Exception):
    """The engine is dead; the message is one sentence for whoever waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRule:
    """One fault: where, what, and on which passes of that point."""

    point: str
    kind: str
    """fail: the request fails. delay: `delay_s` pass. hang: nothing goes on until the rules change. exhaust: every page
    that can be had is gone for `delay_s`, or until the rules change. crash: the engine dies, as SGLang's scheduler
    would, and the process learns of it. kill: the process is gone."""
    nth: int | None = None
    """The pass at which it fires, from 1; without it, every pass."""
    times: int | None = None
    """How often it fires at most. Default: once with `nth` alone, else without end."""
    chance: float | None = None
    """From the n-th pass on, the seeded chance of each pass; default: certain."""
    every: int | None = None
    """Only each so many-th pass, exactly: the n-th and those that far apart after it. Default for `nth`: `every`."""
    delay_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """A fault that has happened."""

    point: str
    kind: str
    passed: int
    """Which pass of the point it was."""
    request_id: str
    time_s: float


def parse_rules(rules: Any, key: str) -> tuple[FaultRule, ...]:
    """Check a list of faults.

    Raises:
        ConfigError: names the entry under `key`.
    """
    if not isinstance(rules, list):
        raise ConfigError(key, "must be a list of faults")
    return tuple(_parse_rule(rule, f"{key}[{place}]") for place, rule in enumerate(rules))


def _parse_rule(rule: Any, key: str) -> FaultRule:
    known = [f.name for f in fields(FaultRule)]
    if not isinstance(rule, dict) or not {"point", "kind"} <= rule.keys() <= set(known):
        raise ConfigError(key, f"must be an object with point, kind and nothing but {', '.join(known)}")
    for name, allowed in (("point", POINTS), ("kind", KINDS)):
        if rule[name] not in allowed:
            raise ConfigError(f"{key}.{name}", f"must be one of {', '.join(allowed)}, not {rule[name]!r}")
    for name in ("nth", "times", "every"):
        value = rule.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{key}.{name}", f"must be a whole number from 1 up, not {value!r}")
    chance, delay_s = rule.get("chance"), rule.get("delay_s")
    if chance is not None and (type(chance) not in (int, float) or not 0 <= chance <= 1):
        raise ConfigError(f"{key}.chance", f"must be a number from 0 to 1, not {chance!r}")
    if delay_s is None and rule["kind"] == "delay":
        raise ConfigError(f"{key}.delay_s", "must be given with kind delay")
    if delay_s is not None and (type(delay_s) not in (int, float) or not 0 <= delay_s <= 86_400):
        raise ConfigError(f"{key}.delay_s", f"must be a number from 0 to 86400, not {delay_s!r}")
    return FaultRule(**rule)


class _Counter:
    """One rule and how far it is."""

    def __init__(self, rule: FaultRule, seed: str) -> None:
        self.rule = rule
        self._random = random.Random(seed)  # noqa: S311 -- a run must repeat
        self.passed = 0
        is_once = rule.nth is not None and rule.chance is None and rule.every is None
        self._left = rule.times if rule.times is not None else (1 if is_once else None)

    def due(self) -> bool:
        """Count a pass; whether the rule fires on it."""
        self.passed += 1
        if self._left == 0 or not self._is_turn():
            return False
        if self.rule.chance is not None and self._random.random() >= self.rule.chance:
            return False
        if self._left is not None:
            self._left -= 1
        return True

    def _is_turn(self) -> bool:
        """Whether this pass is one of those that the rule is about."""
        first, every = self.rule.nth or self.rule.every or 1, self.rule.every or 1
        return self.passed >= first and (self.passed - first) % every == 0


class Faults:
    """The rules of one engine, replaced as a whole."""

    def __init__(
        self,
        rules: tuple[FaultRule, ...],
        *,
        seed: int,
        clock: Clock,
        control_file: Path | None,
        exhaust: Callable[[float | None], None],
        restore: Callable[[], None],
    ) -> None:
        """`exhaust` takes all memory away, for some seconds or until `restore`."""
        self._seed = seed
        self._clock = clock
        self._control_file = control_file
        self._control_seen: tuple[int, int] | None = None
        self._exhaust = exhaust
        self._restore = restore
        self._changed = asyncio.Event()
        self._counters: list[_Counter] = []
        self.fired: list[Fired] = []
        self.replace(rules)

    def replace(self, rules: tuple[FaultRule, ...]) -> None:
        """Take other rules from now on, counted from their first pass; whatever hangs goes on."""
        self._counters = [_Counter(rule, f"{self._seed} {place}") for place, rule in enumerate(rules)]
        self._restore()
        self._changed.set()
        self._changed = asyncio.Event()

    async def reach(self, point: str, request_id: str) -> None:
        """Pass a point, and whatever the rules have in store there.

        Raises:
            FaultInjected: the request fails.
            EngineCrashed: the engine does.
        """
        self.read_control_file()
        for counter in self._counters:
            if counter.rule.point == point and counter.due():
                self._record(counter, request_id)
                await self._act(counter.rule)

    async def watch_control_file(self) -> None:
        """Follow the control file without end; ends at once when there is none."""
        while self._control_file is not None:
            self.read_control_file()
            await self._clock.sleep(CONTROL_INTERVAL_S)

    def read_control_file(self) -> None:
        """Take the rules of the control file, if it has changed.

        Raises:
            EngineCrashed: it cannot be read, or a rule in it is wrong.
        """
        if self._control_file is None:
            return
        try:
            status = self._control_file.stat()
            seen = status.st_mtime_ns, status.st_size
            if seen == self._control_seen:
                return
            rules = parse_rules(json.loads(self._control_file.read_text()), "faults")
        except FileNotFoundError:
            return
        except (OSError, ValueError, ConfigError) as problem:
            raise EngineCrashed(f"the control file {self._control_file} cannot be used: {problem}") from None
        self._control_seen = seen
        self.replace(rules)

    async def _act(self, rule: FaultRule) -> None:
        if rule.kind == "fail":
            raise FaultInjected(f"the simulated engine fails at {rule.point}, as its rules say")
        if rule.kind == "crash":
            raise EngineCrashed(f"the simulated engine crashed at {rule.point}, as its rules say")
        if rule.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if rule.kind == "exhaust":
            self._exhaust(rule.delay_s)
        if rule.kind == "delay":
            assert rule.delay_s is not None
            await self._clock.sleep(rule.delay_s)
        if rule.kind == "hang":
            await self._changed.wait()

    def _record(self, counter: _Counter, request_id: str) -> None:
        fired = Fired(
            point=counter.rule.point,
            kind=counter.rule.kind,
            passed=counter.passed,
            request_id=request_id,
            time_s=self._clock.time_s(),
        )
        self.fired.append(fired)
        if self._control_file is not None:
            line = {name: getattr(fired, name) for name in Fired.__slots__}
            with self._control_file.with_name(f"{self._control_file.name}.fired").open("a") as log:
                log.write(json.dumps(line) + "\n")
