"""Options of the simulated engine (`EngineSettings.extra`), checked before anything starts.

Owns the defaults, which are small so that tests take seconds, and the profiles: sets of values measured on a real
engine that replace the defaults. An unknown or malformed key is a ConfigError that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tandem.domain.limits import PORT_MAX
from tandem.engine.simulated.faults import FaultRule, parse_rules
from tandem.errors import ConfigError

PROFILES = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Timing model, scheduler, bootstrap timeouts and faults of one simulated engine."""

    profile: str | None = None
    """A fitted profile: the name of a built-in one, or the path of a JSON file. Other keys override its values."""
    weights: str | None = None
    """Name of the weights, as after a change of the model: engines with different names have different model digests.
    """

    prefill_step_s: float = 0.0
    """Fixed time of a forward pass over prompts."""
    prefill_tokens_per_s: float = 1e6
    """Prompt tokens computed per second; tokens found in the prefix cache take no time."""
    prefill_pair_s: float = 0.0
    """Time per pair of a prompt token and an earlier one: the quadratic cost of attention."""
    decode_step_s: float = 0.001
    """Fixed time of a decode step, in which every running request gets a token."""
    decode_request_s: float = 0.0
    """Time that each running request adds to a decode step."""
    decode_context_token_s: float = 0.0
    """Time that each context token of each running request adds to a decode step."""
    transfer_latency_s: float = 0.0
    """Fixed time of each part of a KV transfer."""
    transfer_bytes_per_s: float = 10e9
    """Bandwidth of a prefill engine; its KV transfers share it, part by part."""
    role_switch_s: float = 0.1
    """Time to switch between prefill and decode in place."""
    jitter: float = 0.0
    """Every duration is scaled by a seeded random factor from 1 - jitter to 1 + jitter."""

    page_size_tokens: int = 16
    """Tokens of one page of KV memory, the unit of allocation and of the prefix cache."""
    chunked_prefill_tokens: int = 2048
    """Maximum prompt tokens of one step, a multiple of the page size; a longer prompt takes several steps."""
    prefill_tokens_max: int = 16_384
    """Maximum prompt tokens of all requests in one step."""
    mixed_chunk: bool = False
    """Whether running requests also get a token in prefill steps."""
    new_token_ratio: float = 0.7
    """Initial estimate of the share of its token budget that a request will emit, used for admission."""
    reserved_decode_tokens: int = 512
    """Decode: memory reserved per request beyond its prompt; at most an eighth of the KV memory."""
    prefix_cache: bool = True
    """Whether the KV of finished prompts is kept for prompts that begin alike."""
    decode_prefix_cache: bool = False
    """Decode: whether the KV of finished requests is kept too; then only the rest of a prompt is transferred."""
    kv_events: bool = True
    """Whether the engine reports pages that enter or leave the prefix cache."""
    kv_event_loss: float = 0.0
    """Fraction of these reports that are lost before the worker reads them; noticed and repaired as on SGLang."""

    bootstrap_timeout_s: float = 3600.0
    """How long a prefill leg waits for the decode leg to connect, which needs memory first."""
    transfer_timeout_s: float = 120.0
    """How long a decode leg with memory waits for its KV, including the computation of the prompt; a worker's
    `handover_timeout_s` replaces this default."""
    bootstrap_advertised_port: int | None = None
    """Port that is advertised instead of the listening one, for tests with a proxy in front of it."""

    eos_after_tokens: int | None = None
    """Position (from 1) in the generation at which the end-of-sequence token is emitted; default: never."""
    eos_chance: float = 0.0
    """Probability of the end-of-sequence token at each position; a hash of the sequence decides, so that a
    continuation on another worker agrees."""

    faults: tuple[FaultRule, ...] = ()
    """Rules of the faults to inject, from the start."""
    control_file: Path | None = None
    """A JSON file with a list of fault rules, which replaces `faults` whenever the file changes."""


def parse_options(extra: dict[str, Any]) -> Options:
    """Check `extra` key by key, on top of its profile.

    Raises:
        ConfigError: names the key as `engine_extra.<key>`.
    """
    values = {**_read_profile(extra.get("profile")), **extra}
    known = {f.name for f in fields(Options)}
    for key, value in values.items():
        if key not in known:
            problem = f"is not an option of the simulated engine; options are {', '.join(sorted(known))}"
            raise ConfigError(f"engine_extra.{key}", problem)
        _check(key, value)
    if "faults" in values:
        values["faults"] = parse_rules(values["faults"], "engine_extra.faults")
    if values.get("control_file") is not None:
        values["control_file"] = Path(values["control_file"])
    options = Options(**values)
    if options.chunked_prefill_tokens % options.page_size_tokens:
        problem = f"must be a multiple of page_size_tokens ({options.page_size_tokens})"
        raise ConfigError("engine_extra.chunked_prefill_tokens", problem)
    return options


def _read_profile(name: Any) -> dict[str, Any]:
    """The options of a profile; empty if no profile is named."""
    if name is None:
        return {}
    if not isinstance(name, str) or not name:
        raise _refuse("profile", "the name of a profile or the path of one", name)
    file = PROFILES / f"{name}.json" if "/" not in name and not name.endswith(".json") else Path(name)
    try:
        options = json.loads(file.read_text())["options"]
    except (OSError, ValueError, TypeError, KeyError):
        known = ", ".join(sorted(path.stem for path in PROFILES.glob("*.json")))
        raise _refuse("profile", f"one of {known}, or a JSON file with `options`", name) from None
    if not isinstance(options, dict) or "profile" in options:
        raise _refuse("profile", "a file whose `options` are an object without a profile", name)
    return options


def _refuse(key: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"engine_extra.{key}", f"must be {expected}, not {value!r}")


def _is_number(value: object) -> bool:
    # bool is an int to Python; `decode_step_s: true` is a mistake all the same.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What the value of an option must be."""

    expected: str
    accepts: Callable[[Any], bool]


_POSITIVE_NUMBER = _Rule("a number above 0", lambda value: _is_number(value) and value > 0)
_NUMBER_FROM_0 = _Rule("a number, at least 0", lambda value: _is_number(value) and value >= 0)
_FRACTION = _Rule("a number, 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_WHOLE_FROM_1 = _Rule("a whole number, at least 1", lambda value: _is_whole(value) and value >= 1)
_WHOLE_FROM_0 = _Rule("a whole number, at least 0", lambda value: _is_whole(value) and value >= 0)
_PORT = _Rule(f"a whole number, 1 to {PORT_MAX}", lambda value: _is_whole(value) and 1 <= value <= PORT_MAX)
_TEXT = _Rule("a text", lambda value: isinstance(value, str) and value != "")
_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_FAULTS = _Rule("a list of rules", lambda value: True)
"""`parse_rules` checks them, and names the rule at fault."""
_NULLABLE = frozenset({"profile", "weights", "bootstrap_advertised_port", "eos_after_tokens", "control_file"})

_RULES = {
    "profile": _TEXT,
    "weights": _TEXT,
    "prefill_step_s": _NUMBER_FROM_0,
    "prefill_pair_s": _NUMBER_FROM_0,
    "decode_step_s": _NUMBER_FROM_0,
    "decode_request_s": _NUMBER_FROM_0,
    "decode_context_token_s": _NUMBER_FROM_0,
    "transfer_latency_s": _NUMBER_FROM_0,
    "role_switch_s": _NUMBER_FROM_0,
    "jitter": _FRACTION,
    "page_size_tokens": _WHOLE_FROM_1,
    "chunked_prefill_tokens": _WHOLE_FROM_1,
    "prefill_tokens_max": _WHOLE_FROM_1,
    "mixed_chunk": _FLAG,
    "new_token_ratio": _FRACTION,
    "reserved_decode_tokens": _WHOLE_FROM_0,
    "prefix_cache": _FLAG,
    "decode_prefix_cache": _FLAG,
    "kv_events": _FLAG,
    "kv_event_loss": _FRACTION,
    "bootstrap_advertised_port": _PORT,
    "eos_after_tokens": _WHOLE_FROM_1,
    "eos_chance": _FRACTION,
    "faults": _FAULTS,
    "control_file": _TEXT,
}


def expected(key: str) -> str:
    """What the value of an option must be, in words."""
    return _RULES.get(key, _POSITIVE_NUMBER).expected


def _check(key: str, value: Any) -> None:
    rule = _RULES.get(key, _POSITIVE_NUMBER)
    if not rule.accepts(value) and not (value is None and key in _NULLABLE):
        raise _refuse(key, rule.expected, value)
