"""Options of the simulated engine: every mistake is refused before start and named by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.engine.factory import create_engine
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.options import Options, parse_options
from tandem.engine.simulated.timing import Timing
from tandem.errors import ConfigError
from tandem.model.worker import WorkerRole


def test_defaults_and_values() -> None:
    assert parse_options({}) == Options()
    assert parse_options({"decode_step_s": 0, "fail_at": "transfer", "eos_after_tokens": 3}) == Options(
        decode_step_s=0, fail_at="transfer", eos_after_tokens=3
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decode_steps_s", 1),
        ("prefill_tokens_per_s", 0),
        ("prefill_tokens_per_s", "fast"),
        ("transfer_bytes_per_s", -1),
        ("decode_step_s", -0.1),
        ("decode_step_s", True),
        ("decode_step_s", float("nan")),
        ("prefill_tokens_per_s", float("inf")),
        ("jitter", 1.5),
        ("eos_chance", float("nan")),
        ("page_size_tokens", 0),
        ("page_size_tokens", 1.5),
        ("decode_step_s", "10" * 200),
        ("bootstrap_timeout_s", None),
        ("eos_after_tokens", 0),
        ("prefix_cache", 1),
        ("fail_at", "lunch"),
    ],
)
def test_mistakes_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({key: value})
    assert caught.value.key == f"engine_extra.{key}"


@pytest.mark.parametrize(("key", "value"), [("dtype", "float12"), ("transfer_backend", "pigeon")])
def test_settings_are_checked_too(key: str, value: str) -> None:
    settings = EngineSettings(role=WorkerRole.DECODE, model_path=Path("x"), model_name="m", **{key: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        create_engine("simulated", settings)
    assert caught.value.key == key


def test_jitter_is_seeded_and_bounded() -> None:
    options = Options(decode_step_s=1.0, jitter=0.25)
    one, same, other = (Timing(options, seed) for seed in (1, 1, 2))
    durations_s = [one.decode_step_s() for _ in range(50)]
    assert durations_s == [same.decode_step_s() for _ in range(50)]
    assert durations_s != [other.decode_step_s() for _ in range(50)]
    assert all(0.75 <= d <= 1.25 for d in durations_s)
    assert max(durations_s) - min(durations_s) > 0.2


def test_durations_follow_the_rates() -> None:
    timing = Timing(Options(prefill_tokens_per_s=100, transfer_bytes_per_s=1000, decode_step_s=0.5), 0)
    assert (timing.prefill_s(50), timing.transfer_s(250), timing.decode_step_s()) == (0.5, 0.25, 0.5)
