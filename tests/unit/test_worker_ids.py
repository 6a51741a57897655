"""Worker ids: the same syntax in settings and registry, configured or derived from the address."""

from __future__ import annotations

import pytest
from tandem_registry.validation import checked_worker_id

from tandem import config as configuration
from tandem.domain.worker import WorkerRole, default_worker_id
from tandem.errors import ConfigError
from tandem.worker.config import WorkerConfig


@pytest.mark.parametrize(
    ("address", "worker_id"),
    [
        ("127.0.0.1:7401", "decode-127.0.0.1-7401"),
        ("[::1]:7401", "decode--1-7401"),
        ("[fe80::1%eth0]:7401", "decode--fe80-1-eth0-7401"),
        ("gpu_7.example.org:1", "decode-gpu_7.example.org-1"),
    ],
)
def test_a_name_that_was_not_given_is_one_the_registry_takes(address: str, worker_id: str) -> None:
    assert default_worker_id(WorkerRole.DECODE, address) == worker_id
    assert checked_worker_id("worker_id", worker_id) == worker_id


def test_a_long_host_keeps_its_port() -> None:
    worker_id = default_worker_id(WorkerRole.AGGREGATED, "h" * 253 + ":7401")
    assert checked_worker_id("worker_id", worker_id) == worker_id
    assert worker_id.endswith("h-7401")


@pytest.mark.parametrize("worker_id", ["decode:0", "a b", "", "a" * 129, "decode-0\n", "ä"])
def test_settings_refuse_what_the_registry_would(worker_id: str) -> None:
    arguments = ["--registry=127.0.0.1:1", "--model=m", f"--worker-id={worker_id}"]
    with pytest.raises(ConfigError) as refused:
        configuration.load(WorkerConfig, "tandem-decode", arguments, {})
    assert refused.value.key == "worker_id"
