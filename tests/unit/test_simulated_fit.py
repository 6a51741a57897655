"""The arithmetic of tools/fit_simulated_engine.py: it finds the coefficients that made the durations, none below 0."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tandem.engine.simulated.options import parse_options
from tandem.engine.simulated.timing import Chunk, Step, Timing
from tandem.testing.virtual_time import run_virtually
from tests.unit.support.simulated_legs import leg_of

TOOL = Path(__file__).parents[2] / "tools" / "fit_simulated_engine.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("numpy")
    spec = importlib.util.spec_from_file_location("fit_simulated_engine", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fitted_times_are_those_that_the_engine_spends(tool: ModuleType) -> None:
    """From durations through the profile's options to the durations of a step."""
    truth = {"prefill": (0.01, 5e-5, 1e-7), "decode": (0.008, 6e-4, 2e-6)}
    prompts = [16, 64, 256, 1024]
    batches = [(1, 32), (2, 500), (4, 100), (8, 1000)]
    features: dict[str, list[tuple[float, float, float]]] = {
        "prefill": [(1.0, n, n * n / 2) for n in prompts],
        "decode": [(1.0, count, count * context) for count, context in batches],
    }
    samples = [
        tool.Sample(kind, "", row, sum(c * f for c, f in zip(truth[kind], row, strict=True)))
        for kind, rows in features.items()
        for row in rows
    ]
    fits = {kind: tool.fit([s for s in samples if s.kind == kind]) for kind in truth}
    for kind, coefficients in truth.items():
        assert fits[kind] == pytest.approx(coefficients, rel=1e-2)

    class Engine:
        page_size_tokens = 1

    timing = Timing(parse_options(tool.options_of(fits, Engine())), 0)
    chunk = Chunk(leg_of(range(10, 266)), 0, 256, first=True)
    assert timing.step_s(Step((chunk,))) == pytest.approx(samples[2].measured_s, rel=1e-2)
    legs = [leg_of(range(10, 42)) for _ in range(4)]
    for leg in legs:
        leg.computed_tokens = 100
    assert timing.step_s(Step(decodes=tuple(legs))) == pytest.approx(samples[6].measured_s, rel=1e-2)


def test_no_term_is_negative(tool: ModuleType) -> None:
    samples = [tool.Sample("transfer", "", (1.0, float(n)), n * 2.0 - 0.5) for n in (1, 2, 4, 8)]
    latency_s, byte_s = tool.fit(samples)
    assert latency_s == 0
    assert 1.5 < byte_s < 2


def test_the_fit_checks_itself_against_the_simulated_engine(tool: ModuleType) -> None:
    model, options = TOOL.parents[1] / "models" / "tandem-demo", {"prefill_step_s": 1.0, "decode_step_s": 0.5}
    assert run_virtually(tool.simulated_batch_s(model, options, (1, 16, 3))) == pytest.approx(2.0, rel=0.1)
