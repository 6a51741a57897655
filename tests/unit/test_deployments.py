"""The files for Kubernetes, Nomad and systemd: settings that exist, time for a drain, and as little as can be asked."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem import config as configuration
from tandem.cli.up_command import up
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tests.unit.support.deployed_settings import CONFIGS, REPOSITORY, VARIABLE, drain_s, unknown_settings

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes" / "base"
NOMAD = DEPLOY / "nomad" / "tandem.nomad.hcl"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SETTINGS = sorted((DEPLOY / "systemd").glob("*.toml"))
STOP_SLACK_S = 10


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def pods() -> dict[str, dict[str, Any]]:
    """The pods by their service."""
    everything = [document for file in sorted(KUBERNETES.glob("*.yaml")) for document in documents(file)]
    found = [document for document in everything if document["kind"] == "Deployment"]
    return {pod["metadata"]["name"].removeprefix("tandem-"): pod["spec"]["template"]["spec"] for pod in found}


def test_kubernetes_has_every_service() -> None:
    assert set(pods()) == set(CONFIGS)
    listed = documents(KUBERNETES / "kustomization.yaml")[0]["resources"]
    assert {f"{service}.yaml" for service in CONFIGS} <= set(listed)


@pytest.mark.parametrize("service", CONFIGS)
def test_a_pod_is_confined_and_has_time(service: str) -> None:
    pod = pods()[service]
    # Kubernetes' own variables for a Service called tandem-registry would be taken for settings, and stop a process.
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    [container] = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in container["resources"]["limits"]
    assert "readinessProbe" in container
    names = [variable["name"] for variable in container["env"]]
    assert unknown_settings(names) == []
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    settle_s = float(given.get(f"TANDEM_{service.upper()}_DRAIN_SETTLE_S") or 0)
    assert pod["terminationGracePeriodSeconds"] >= drain_s(service) + settle_s + STOP_SLACK_S


def test_nomad_sets_only_what_can_be_set() -> None:
    text = NOMAD.read_text()
    variables = [match[0] for match in VARIABLE.finditer(text)]
    assert {variable.split("_")[1].lower() for variable in variables} == set(CONFIGS)
    assert unknown_settings(variables) == []
    timeouts = [float(found) for found in re.findall(r'kill_timeout += "(\d+)s"', text)]
    assert len(timeouts) == len(CONFIGS)
    assert min(timeouts) >= max(drain_s(service) for service in CONFIGS) + STOP_SLACK_S
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.name)
def test_example_settings_are_taken(file: Path) -> None:
    service = file.stem.partition("-")[0]
    config = configuration.load(CONFIGS[service], f"tandem-{service}", ["--config", str(file)], {})
    assert config.port


def test_the_console_of_the_example_settings_is_taken_without_its_marks_of_a_comment(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "frontend.toml").read_text()
    (tmp_path / "frontend.toml").write_text(re.sub(r"(?m)^# (?=console_)", "", text))
    flags = ["--config", str(tmp_path / "frontend.toml")]
    config: Any = configuration.load(CONFIGS["frontend"], "tandem-frontend", flags, {})
    assert (config.console_port, config.console_keys) == (8090, Path("/etc/tandem/console.keys"))
    assert "console_port" not in tomllib.loads(text)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_what_is_installed_and_lets_it_drain(unit: Path) -> None:
    text = unit.read_text()
    command = re.search(r"^ExecStart=/opt/tandem/bin/tandem-(\w+) --config /etc/tandem/(\S+)$", text, re.MULTILINE)
    assert command is not None
    service = command[1]
    assert unit.name.startswith(f"tandem-{service}")
    assert (DEPLOY / "systemd" / command[2].replace("%i", "0")).is_file()
    stop = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert stop is not None
    assert float(stop[1]) >= drain_s(service) + STOP_SLACK_S
    assert "\nRestart=always\n" in text
    assert "\nStartLimitIntervalSec=0\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_understands_a_unit(unit: Path, tmp_path: Path) -> None:
    # As if it were installed: a program that is there, and an instance of a template.
    file = tmp_path / unit.name.replace("@", "@0")
    file.write_text(re.sub(r"/opt/tandem/bin/\S+", "/bin/true", unit.read_text()))
    (tmp_path / unit.name).write_text(file.read_text())
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert unit.name not in verified.stderr, verified.stderr


FIRST_GPU_START_S = 264
"""Longest that was measured."""


@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_the_first_start_on_a_gpu_has_time(service: str) -> None:
    name = f"TANDEM_{service.upper()}_CANARY_TIMEOUT_S"
    given = {variable["name"]: variable.get("value") for variable in pods()[service]["containers"][0]["env"]}
    assert float(given[name]) > FIRST_GPU_START_S
    [in_nomad] = re.findall(rf'{name} *= "(\d+)"', NOMAD.read_text())
    assert float(in_nomad) > FIRST_GPU_START_S
    [unit] = [file for file in SETTINGS if file.name.startswith(service)]
    assert tomllib.loads(unit.read_text())["canary_timeout_s"] > FIRST_GPU_START_S
    compose = yaml.safe_load((REPOSITORY / "docker-compose.gpu.yml").read_text())
    found = [s["environment"][name] for s in compose["services"].values() if name in s.get("environment", {})]
    assert found
    assert min(float(value) for value in found) > FIRST_GPU_START_S
    image = (REPOSITORY / "services" / service / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", image, flags=re.MULTILINE)
    [gpu] = [stage for stage in stages if f"{service.upper()}_DEVICE=cuda" in stage]
    [in_image] = re.findall(rf"{name}=(\d+)", gpu)
    assert float(in_image) > FIRST_GPU_START_S


def test_no_file_that_is_shipped_gives_a_first_start_less() -> None:
    """Also one that is added later; overlays inherit what their base says."""
    shipped = [*DEPLOY.rglob("*"), *REPOSITORY.glob("docker-compose*"), *REPOSITORY.glob("services/*/Dockerfile")]
    setting = re.compile(r"canary_timeout_s\W+(?:value\W+)?(\d+)", re.IGNORECASE)
    given: dict[str, list[float]] = {}
    for file in filter(Path.is_file, shipped):
        found = setting.findall(file.read_text(errors="replace"))
        if found:
            given[str(file.relative_to(REPOSITORY))] = [float(value) for value in found]
    assert len(given) >= 8, given
    assert min(value for values in given.values() for value in values) > FIRST_GPU_START_S
    assert inspect.signature(up).parameters["canary_timeout_s"].default > FIRST_GPU_START_S


@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_a_worker_that_waits_for_a_registry_is_not_ready_and_not_restarted(service: str) -> None:
    [container] = pods()[service]["containers"]
    assert container["startupProbe"]["grpc"]["service"] == PROCESS_SERVICE_NAME
    assert "service" not in container["readinessProbe"]["grpc"]
    assert "tcpSocket" in container["livenessProbe"]


def test_a_frontend_without_workers_is_not_ready_and_lives() -> None:
    [container] = pods()["frontend"]["containers"]
    assert "grpc" in container["readinessProbe"]
    assert "tcpSocket" in container["livenessProbe"]
    assert "startupProbe" not in container
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    workers_s = compose["decode-1"]["healthcheck"]["start_period"]
    assert compose["frontend-1"]["healthcheck"]["start_period"] == workers_s, "it is healthy after the workers"
