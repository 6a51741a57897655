"""Arguments that Tandem sets in SGLang, and the reasons for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang import arguments
from tandem.engine.sglang.hooks import scheduler_hooks

PORTS = arguments.Ports(server=1, distributed=2, bootstrap=3)


def settings(role: WorkerRole, kv_capacity_tokens: int | None = None) -> EngineSettings:
    return EngineSettings(role=role, model_path=Path("m"), model_name="m", kv_capacity_tokens=kv_capacity_tokens)


@pytest.mark.parametrize(("kv_capacity_tokens", "reserved"), [(512, 64), (64, 8), (4_096, 512), (10**6, 512)])
def test_a_small_pool_on_decode_reserves_little(kv_capacity_tokens: int, reserved: int) -> None:
    """With SGLang's 512 a decode engine of 512 tokens would never take a prompt, its canary included."""
    found = arguments._role_arguments(settings(WorkerRole.DECODE, kv_capacity_tokens), "cpu", PORTS)
    assert found["num_reserved_decode_tokens"] == reserved
    assert reserved < kv_capacity_tokens / 4


def test_elsewhere_nothing_is_reserved() -> None:
    for role, capacity in ((WorkerRole.PREFILL, 512), (WorkerRole.DECODE, None), (WorkerRole.AGGREGATED, 512)):
        assert "num_reserved_decode_tokens" not in arguments._role_arguments(settings(role, capacity), "cpu", PORTS)


def test_penalties_are_not_compiled_at_their_first_use_on_a_cpu() -> None:
    for device, count in (("cpu", 2), ("cuda", 0)):
        assert sum(target.endswith(".apply_scaling_penalties") for target in scheduler_hooks.targets(device)) == count


@pytest.mark.parametrize(
    ("device", "kv_capacity_tokens", "wanted", "expected"),
    [
        ("cpu", None, None, 16),
        ("cpu", 10**6, None, 16),
        ("cuda", None, None, 256),
        ("cuda", 10**6, None, 256),
        ("cuda", 65_536, None, 128),
        ("cuda", 1_024, None, 16),
        ("cuda", None, 4, 4),
        ("cpu", None, 64, 64),
    ],
)
def test_requests_at_a_time_fit_the_device_and_its_kv_memory(
    device: str, kv_capacity_tokens: int | None, wanted: int | None, expected: int
) -> None:
    own = replace(settings(WorkerRole.DECODE, kv_capacity_tokens), running_requests_max=wanted)
    assert arguments.running_requests_max(own, device) == expected
