"""Options of the simulated engine: every invalid one is rejected before start and named by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.domain.worker import WorkerRole
from tandem.engine.factory import create_engine
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.options import PROFILES, Options, parse_options
from tandem.engine.simulated.timing import Chunk, Step, Timing
from tandem.errors import ConfigError
from tests.unit.support.simulated_engines import PROMPT
from tests.unit.support.simulated_legs import leg_of


def test_defaults_and_values() -> None:
    assert parse_options({}) == Options()
    assert parse_options({"decode_step_s": 0, "eos_after_tokens": 3}) == Options(decode_step_s=0, eos_after_tokens=3)


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
        ("faults", {}),
        ("chunked_prefill_tokens", 100),
        ("mixed_chunk", 1),
        ("profile", "pigeon"),
        ("weights", ""),
        ("reserved_decode_tokens", -1),
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


def step_of(*prompts: int, decodes: int = 0, context_tokens: int = 0) -> Step:
    legs = []
    for _ in range(decodes):
        leg = leg_of(PROMPT)
        leg.computed_tokens = context_tokens
        legs.append(leg)
    return Step(tuple(Chunk(leg_of(PROMPT), 0, tokens, first=True) for tokens in prompts), tuple(legs))


def test_jitter_is_seeded_and_bounded() -> None:
    options = Options(decode_step_s=1.0, jitter=0.25)
    one, same, other = (Timing(options, seed) for seed in (1, 1, 2))
    step = step_of(decodes=1)
    durations_s = [one.step_s(step) for _ in range(50)]
    assert durations_s == [same.step_s(step) for _ in range(50)]
    assert durations_s != [other.step_s(step) for _ in range(50)]
    assert all(0.75 <= d <= 1.25 for d in durations_s)
    assert max(durations_s) - min(durations_s) > 0.2


def test_durations_follow_the_rates() -> None:
    timing = Timing(Options(prefill_tokens_per_s=100, transfer_bytes_per_s=1000, decode_step_s=0.5), 0)
    assert timing.step_s(step_of(50)) == timing.step_s(step_of(20, 30)) == 0.5
    assert timing.step_s(step_of(decodes=1)) == timing.step_s(step_of(decodes=9)) == 0.5
    assert timing.transfer_s(250) == 0.25


def test_a_step_costs_by_its_batch_its_context_and_the_square_of_its_prompts() -> None:
    timing = Timing(
        Options(
            prefill_step_s=1, prefill_tokens_per_s=10, prefill_pair_s=0.02, decode_step_s=2, decode_request_s=0.5,
            decode_context_token_s=0.01, transfer_latency_s=3, transfer_bytes_per_s=10,
        ),
        0,
    )  # fmt: skip
    assert timing.step_s(step_of(10)) == pytest.approx(1 + 1 + 0.02 * 50)
    later = Step((Chunk(leg_of(PROMPT), 100, 10, first=False),))
    assert timing.step_s(later) == pytest.approx(1 + 1 + 0.02 * 1050)
    assert timing.step_s(step_of(decodes=4, context_tokens=25)) == pytest.approx(2 + 4 * 0.5 + 4 * 0.25)
    assert timing.step_s(step_of(10, decodes=4, context_tokens=25)) == pytest.approx(3 + 4 * 0.5 + 4 * 0.25)
    assert (timing.transfer_s(10), timing.transfer_s(10, begun=True)) == (4, 1)


@pytest.mark.parametrize("profile", [path.stem for path in PROFILES.glob("*.json")])
def test_profiles_that_come_with_tandem_load(profile: str) -> None:
    fitted = parse_options({"profile": profile})
    assert fitted.decode_step_s > Options().decode_step_s, "no profile was read"


def test_a_profile_overrides_defaults_but_not_given_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"options": {"decode_step_s": 0.5, "jitter": 0.1}}))
    options = parse_options({"profile": str(file), "jitter": 0.2})
    assert (options.decode_step_s, options.jitter) == (0.5, 0.2)
    file.write_text(json.dumps({"options": {"decode_steps_s": 0.5}}))
    with pytest.raises(ConfigError, match="decode_steps_s"):
        parse_options({"profile": str(file)})
    file.write_text("[]")
    with pytest.raises(ConfigError, match="profile"):
        parse_options({"profile": str(file)})
