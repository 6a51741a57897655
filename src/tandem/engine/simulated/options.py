"""What `EngineSettings.extra` may say to the simulated engine, checked before anything starts.

Owns the defaults, which are small so that tests take seconds. An unknown or malformed key is a ConfigError that
names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from tandem.errors import ConfigError

FAIL_AT = ("canary", "bootstrap", "transfer", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The timing model, the bounds of the rendezvous and the faults of one simulated engine."""

    prefill_tokens_per_s: float = 1e6
    """One prompt at a time; prompt tokens found in the prefix cache cost nothing."""
    decode_step_s: float = 0.001
    """Time between two tokens of one request, whatever the batch."""
    transfer_bytes_per_s: float = 10e9
    """Bandwidth of the hand-over, for each request on its own."""
    jitter: float = 0.0
    """Every duration is scaled by a seeded random factor from 1 - jitter to 1 + jitter."""
    page_size_tokens: int = 16
    bootstrap_timeout_s: float = 30.0
    """How long one leg waits for the other to come."""
    transfer_timeout_s: float = 30.0
    """How long one leg waits for the other to move on once they have met, the prefill's computing included."""
    eos_after_tokens: int | None = None
    """Place in this generation (from 1) at which the end-of-sequence token comes; None: never."""
    eos_chance: float = 0.0
    """Chance of the end-of-sequence token at each place, drawn from the sequence so far: a continuation agrees."""
    prefix_cache: bool = True
    kv_events: bool = True
    fail_at: str | None = None
    """"bootstrap", "transfer" or "decode": every request breaks there."""


def parse_options(extra: dict[str, Any]) -> Options:
    """Check `extra` key by key.

    Raises:
        ConfigError: names the key as `engine_extra.<key>`.
    """
    known = {f.name for f in fields(Options)}
    for key, value in extra.items():
        if key not in known:
            raise ConfigError(f"engine_extra.{key}", f"the simulated engine knows only {', '.join(sorted(known))}")
        _CHECKS.get(key, _positive_number)(key, value)
    return Options(**extra)


def _refuse(key: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"engine_extra.{key}", f"must be {expected}, not {value!r}")


def _is_number(value: object) -> bool:
    # bool is an int to Python; `decode_step_s: true` is a mistake all the same.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _positive_number(key: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise _refuse(key, "a number above 0", value)


def _number_from_0(key: str, value: Any) -> None:
    if not _is_number(value) or value < 0:
        raise _refuse(key, "a number from 0 up", value)


def _fraction(key: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise _refuse(key, "a number from 0 to 1", value)


def _positive_int(key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refuse(key, "a whole number from 1 up", value)


def _optional_positive_int(key: str, value: Any) -> None:
    if value is not None:
        _positive_int(key, value)


def _flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refuse(key, "true or false", value)


def _fail_at(key: str, value: Any) -> None:
    if value is not None and value not in FAIL_AT:
        raise _refuse(key, f"one of {', '.join(FAIL_AT)}", value)


_CHECKS = {
    "decode_step_s": _number_from_0,
    "jitter": _fraction,
    "eos_chance": _fraction,
    "page_size_tokens": _positive_int,
    "eos_after_tokens": _optional_positive_int,
    "prefix_cache": _flag,
    "kv_events": _flag,
    "fail_at": _fail_at,
}
