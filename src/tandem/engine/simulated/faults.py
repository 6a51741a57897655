"""Fault injection at named points of the simulated engine: rules, when they fire, and a record of each that fired.

Owns the rules and their counters; randomness is seeded, so that a run is repeatable. `machine` implements a crash and
memory exhaustion.
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

from tandem.engine.simulated.kv_content import DAMAGES
from tandem.engine.simulated.timing import Clock
from tandem.errors import ConfigError

ENGINE_POINTS = ("admit", "prefill_chunk", "decode_step", "finish", "abort")
"""Points in the engine's loop: a hang there blocks every request."""
LEG_POINTS = ("adapter", "canary", "bootstrap", "transfer_begin", "transfer_middle", "transfer_end", "kv_arrived")
"""Points in a request's own task, or in the loading of an adapter: a hang there blocks nothing else."""
POINTS = (*ENGINE_POINTS, *LEG_POINTS)
KINDS = ("fail", "delay", "hang", "exhaust", "crash", "kill", *DAMAGES)
CONTROL_INTERVAL_S = 0.05


class FaultInjected(Exception):
    """A fault rule makes this request fail here."""


class EngineCrashed(Exception):
    """A fault rule has killed the engine; the message is the sentence that `wait_failed` returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRule:
    """One fault: its point, its kind, and the passes of the point at which it fires."""

    point: str
    kind: str
    """fail: the request fails. delay: waits for `delay_s`. hang: waits until the rules change. exhaust: withholds every
    available page for `delay_s`, or until the rules change. crash: the engine dies as if SGLang's scheduler had died,
    and `wait_failed` returns. kill: the process gets SIGKILL. Those of `kv_content.DAMAGES`, at kv_arrived only: the KV
    is damaged before it is checked."""
    nth: int | None = None
    """The first pass at which it fires, from 1; None: every pass."""
    times: int | None = None
    """Maximum number of times it fires. Default: once with `nth` alone, else unlimited."""
    chance: float | None = None
    """Probability of firing per pass, from the `nth` on; seeded. Default: 1."""
    every: int | None = None
    """Fires at pass `nth` and at every `every`-th pass after it; `nth` then defaults to `every`."""
    delay_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """Record of a fault that has fired."""

    point: str
    kind: str
    passed: int
    """Number of the pass, from 1."""
    request_id: str
    time_s: float


def parse_rules(rules: Any, key: str) -> tuple[FaultRule, ...]:
    """Check and convert a list of fault rules.

    Raises:
        ConfigError: a rule is invalid; names the entry under `key`.
    """
    if not isinstance(rules, list):
        raise ConfigError(key, "must be a list of fault rules")
    return tuple(_parse_rule(rule, f"{key}[{index}]") for index, rule in enumerate(rules))


def _parse_rule(rule: Any, key: str) -> FaultRule:
    known = [f.name for f in fields(FaultRule)]
    if not isinstance(rule, dict) or not {"point", "kind"} <= rule.keys() <= set(known):
        raise ConfigError(key, f"must be an object with point and kind, and no keys but {', '.join(known)}")
    for name, allowed in (("point", POINTS), ("kind", KINDS)):
        if rule[name] not in allowed:
            raise ConfigError(f"{key}.{name}", f"must be one of {', '.join(allowed)}, not {rule[name]!r}")
    if rule["kind"] in DAMAGES and rule["point"] != "kv_arrived":
        raise ConfigError(f"{key}.point", f"must be kv_arrived with kind {rule['kind']}, not {rule['point']!r}")
    for name in ("nth", "times", "every"):
        value = rule.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{key}.{name}", f"must be a whole number, at least 1, not {value!r}")
    chance, delay_s = rule.get("chance"), rule.get("delay_s")
    if chance is not None and (type(chance) not in (int, float) or not 0 <= chance <= 1):
        raise ConfigError(f"{key}.chance", f"must be a number, 0 to 1, not {chance!r}")
    if delay_s is None and rule["kind"] == "delay":
        raise ConfigError(f"{key}.delay_s", "is required with kind delay")
    if delay_s is not None and (type(delay_s) not in (int, float) or not 0 <= delay_s <= 86_400):
        raise ConfigError(f"{key}.delay_s", f"must be a number, 0 to 86400, not {delay_s!r}")
    return FaultRule(**rule)


class _Counter:
    """One rule and the number of its passes so far."""

    def __init__(self, rule: FaultRule, seed: str) -> None:
        self.rule = rule
        self._random = random.Random(seed)  # noqa: S311 -- a run must repeat
        self.passed = 0
        is_once = rule.nth is not None and rule.chance is None and rule.every is None
        self._left = rule.times if rule.times is not None else (1 if is_once else None)

    def due(self) -> bool:
        """Count a pass; returns whether the rule fires on it."""
        self.passed += 1
        if self._left == 0 or not self._matches_pass():
            return False
        if self.rule.chance is not None and self._random.random() >= self.rule.chance:
            return False
        if self._left is not None:
            self._left -= 1
        return True

    def _matches_pass(self) -> bool:
        """Whether the rule selects the current pass, by `nth` and `every`."""
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
        """`exhaust` withholds all available memory, for some seconds or (None) until `restore`."""
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
        """Replace all rules; counters start again, and requests that hang continue."""
        self._counters = [_Counter(rule, f"{self._seed} {index}") for index, rule in enumerate(rules)]
        self._restore()
        self._changed.set()
        self._changed = asyncio.Event()

    async def reach(self, point: str, request_id: str) -> tuple[str, ...]:
        """Pass a point, and apply the rules that fire there. Returns the kinds of damage for the caller to apply.

        Raises:
            FaultInjected: a rule makes the request fail.
            EngineCrashed: a rule kills the engine.
        """
        self.read_control_file()
        damages = []
        for counter in self._counters:
            if counter.rule.point == point and counter.due():
                self._record(counter, request_id)
                await self._act(counter.rule)
                damages += [counter.rule.kind] if counter.rule.kind in DAMAGES else []
        return tuple(damages)

    async def watch_control_file(self) -> None:
        """Poll the control file until cancelled; returns at once if none is configured."""
        while self._control_file is not None:
            self.read_control_file()
            await self._clock.sleep(CONTROL_INTERVAL_S)

    def read_control_file(self) -> None:
        """Replace the rules with those of the control file, if it has changed.

        Raises:
            EngineCrashed: the file cannot be read, or a rule in it is invalid.
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
            raise EngineCrashed(f"fault control file {self._control_file} is unusable: {problem}") from None
        self._control_seen = seen
        self.replace(rules)

    async def _act(self, rule: FaultRule) -> None:
        if rule.kind == "fail":
            raise FaultInjected(f"injected fault: the request fails at {rule.point}")
        if rule.kind == "crash":
            raise EngineCrashed(f"injected fault: the engine crashes at {rule.point}")
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
