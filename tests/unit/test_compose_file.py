"""docker-compose.yml and what is laid over it: confined, bounded, healthy by a check, and given only known settings."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.unit.support.deployed_settings import CONFIGS, REPOSITORY, drain_s, unknown_settings

STOP_SLACK_S = 10
"""For an engine's end, after its drain."""


def read(name: str) -> dict[str, Any]:
    text = (REPOSITORY / name).read_text()
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


COMPOSE = read("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
CORE = [name for name, service in SERVICES.items() if "profiles" not in service]
OWN = [name for name in CORE if name != "consul"]


def kind(name: str) -> str:
    """The service of a container: `envoy` is the edge."""
    return "edge" if name == "envoy" else name.partition("-")[0]


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None, text
    return float(found[1])


def test_the_cluster_is_whole() -> None:
    counts = {service: sum(1 for name in OWN if kind(name) == service) for service in CONFIGS}
    assert counts == {"registry": 2, "frontend": 2, "prefill": 2, "decode": 2, "edge": 1}
    assert "consul" in CORE


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert "privileged" not in service
    # Our own images say it themselves (test_images.py).
    assert name in OWN or service["user"].split(":")[0] != "0"


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_pinned(name: str) -> None:
    tag = SERVICES[name]["image"].rpartition(":-")[2] if name not in OWN else SERVICES[name]["image"].rpartition(":")[2]
    assert "latest" not in tag
    assert re.search(r"\d+\.\d+\.\d+", tag), tag


@pytest.mark.parametrize("name", OWN)
def test_compose_services_have_time_for_a_drain(name: str) -> None:
    assert seconds(SERVICES[name]["stop_grace_period"]) >= drain_s(kind(name)) + STOP_SLACK_S


@pytest.mark.parametrize("name", CORE)
def test_the_start_is_ordered_by_health(name: str) -> None:
    needs = SERVICES[name].get("depends_on", {})
    assert all(need == {"condition": "service_healthy"} for need in needs.values())
    assert bool(needs) == (name != "consul")


def test_only_the_edge_is_published_and_only_on_loopback() -> None:
    published = {name: SERVICES[name]["ports"] for name in CORE if "ports" in SERVICES[name]}
    assert published == {"envoy": ["${HTTP_ADDRESS:-127.0.0.1}:${HTTP_PORT:-8080}:8080"]}
    assert COMPOSE["networks"]["cluster"]["internal"] is True


def test_the_console_is_off_without_its_file_and_on_loopback_with_it() -> None:
    assert not any("CONSOLE" in variable for name in OWN for variable in SERVICES[name]["environment"])
    laid_over = read("deploy/compose/console.yml")
    [(name, service)] = laid_over["services"].items()
    assert kind(name) == "frontend"
    assert unknown_settings(service["environment"]) == []
    assert service["ports"] == ["${HTTP_ADDRESS:-127.0.0.1}:${CONSOLE_PORT:-8090}:8090"]
    assert service["environment"]["TANDEM_FRONTEND_CONSOLE_KEYS"] == f"/run/secrets/{next(iter(laid_over['secrets']))}"


@pytest.mark.parametrize("name", OWN)
def test_compose_services_set_only_known_settings(name: str) -> None:
    variables = SERVICES[name]["environment"]
    assert unknown_settings(variables) == []
    for variable in variables:
        assert variable.startswith((f"TANDEM_{kind(name).upper()}_", "OTEL_"))


def test_no_secret_is_inside() -> None:
    for file in ("docker-compose.yml", "docker-compose.gpu.yml"):
        text = (REPOSITORY / file).read_text()
        assert not re.search(r"(?i)(password|token|secret_?key)\s*[:=]\s*\S", text)
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == {
        "${PIP_CONF:-/dev/null}",
        "${CA_BUNDLE:-/dev/null}",
    }


def test_every_variable_has_a_default() -> None:
    for file in ("docker-compose.yml", "docker-compose.gpu.yml"):
        assert re.findall(r"\$\{\w+\}", (REPOSITORY / file).read_text()) == []


def test_gpus_are_reserved_and_memory_can_be_shared() -> None:
    gpu = read("docker-compose.gpu.yml")["services"]
    assert set(gpu) == {name for name in OWN if kind(name) in ("prefill", "decode")}
    for name, service in gpu.items():
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert service["ipc"] == "host"
        assert service["build"]["target"] == "gpu"
        assert seconds(service["stop_grace_period"]) >= drain_s(kind(name)) + STOP_SLACK_S
        assert unknown_settings(service["environment"]) == []
        assert "UCX_TLS" in service["environment"]


def test_compose_mounts_exist_in_the_repository() -> None:
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", ()) if mount.startswith("./")]
    assert mounts
    for mount in mounts:
        assert (REPOSITORY / mount.split(":")[0]).exists(), mount


def test_prometheus_scrapes_every_process_of_its_own() -> None:
    targets = json.loads((REPOSITORY / "deploy" / "compose" / "targets.json").read_text())
    assert {target["labels"]["process"] for target in targets} == set(OWN)
    for target in targets:
        assert target["targets"] == [f"{target['labels']['process']}:9400"]
        assert target["labels"]["role"] == kind(target["labels"]["process"])
