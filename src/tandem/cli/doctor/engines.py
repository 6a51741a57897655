"""Probes of the two real engines: SGLang on the CPU, and on GPUs.

Versions are those that the package pins. What depends on the hardware of a GPU machine is checked as far as files
and the driver show it; only a start of the engine shows the rest.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tandem.cli.doctor.findings import Finding, State
from tandem.cli.doctor.machine import DISTRIBUTION, Machine

ENGINE, TRANSFER = "sglang", "nixl"
PLUGINS = (("sglang.srt.platforms", "tandem_cpu"), ("sglang.srt.plugins", "tandem_hooks"))
SETUP = "make setup"
SHOWN_NAMES = 5


def cpu(machine: Machine) -> Iterator[Finding]:
    """What `--engine sglang --device cpu` needs."""
    yield _system(machine)
    yield _torch(machine)
    yield _libraries(machine)
    for package in (ENGINE, TRANSFER):
        yield _pinned(machine, package, _cpu_install(machine, "--no-deps", "cpu-engine-nodeps.txt"))
    yield _plugins(machine)


def gpu(machine: Machine) -> Iterator[Finding]:
    """What `--engine sglang --device cuda` needs."""
    yield _system(machine)
    yield _driver(machine)
    yield _devices(machine)
    install = _gpu_install(machine)
    yield _cuda_torch(machine, install)
    for package in (ENGINE, TRANSFER):
        yield _pinned(machine, package, install)
    for package in ("sglang-kernel", "nixl-cu13"):
        version = machine.version(package)
        yield _finding(package, version or "", ok=version is not None, mend=install)
    yield _compiler(machine)
    yield _plugins(machine)


def _finding(name: str, found: str, *, ok: bool, mend: str) -> Finding:
    return Finding(
        name=name, state=State.OK if ok else State.MISSING, found=found, mend=None if ok else mend
    )  # fmt: skip


def _system(machine: Machine) -> Finding:
    system = machine.system()
    if system == "Linux":
        return Finding(name="system", state=State.OK, found=f"Linux, Python {machine.python()}")
    return Finding(name="system", state=State.WRONG, found=system, mend="run Tandem on Linux, or in its containers")


def _cpu_install(machine: Machine, *words: str) -> str:
    if machine.in_checkout():
        return SETUP
    options, file = words[:-1], words[-1]
    return shlex.join(["pip", "install", *options, "-r", str(machine.requirements() / file)])


def _gpu_install(machine: Machine) -> str:
    """Without Tandem's own name: nothing guarantees that a package index has it."""
    pins = [f"{package}=={version}" for package in (ENGINE, TRANSFER) if (version := machine.pinned(package))]
    build = [f"nixl-cu13=={version}"] if (version := machine.pinned(TRANSFER)) else []
    return shlex.join(["pip", "install", *pins, *build])


def _torch(machine: Machine) -> Finding:
    version = machine.version("torch")
    mend = _cpu_install(machine, "torch.txt")
    if version is None:
        return Finding(name="torch", state=State.MISSING, mend=mend)
    wanted = machine.pins("torch.txt").get("torch")
    if wanted is None or version.partition("+")[0] == wanted:
        return Finding(name="torch", state=State.OK, found=version)
    return Finding(name="torch", state=State.UNTESTED, found=f"{version}, tested: {wanted}", mend=mend)


def _libraries(machine: Machine) -> Finding:
    """What SGLang imports on a CPU: one line for all of them."""
    wanted = {**machine.pins("cpu-engine.txt"), **machine.pins("cpu-engine-nodeps.txt")}
    for package in (ENGINE, TRANSFER):
        wanted.pop(package, None)
    mend = _cpu_install(machine, "cpu-engine.txt")
    if not machine.in_checkout():
        mend += f" && {_cpu_install(machine, '--no-deps', 'cpu-engine-nodeps.txt')}"
    versions = {name: machine.version(name) for name in wanted}
    absent = [name for name, version in versions.items() if version is None]
    others = [name for name, version in versions.items() if version not in (None, wanted[name])]
    if absent or not wanted:
        found = f"{len(absent)} of {len(wanted)} absent: {_some(absent)}" if wanted else "no list of them"
        return Finding(name="libraries", state=State.MISSING, found=found, mend=mend)
    if others:
        found = f"{len(others)} of {len(wanted)} in other versions: {_some(others)}"
        return Finding(name="libraries", state=State.UNTESTED, found=found, mend=mend)
    return Finding(name="libraries", state=State.OK, found=f"{len(wanted)} packages of SGLang")


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _pinned(machine: Machine, package: str, mend: str) -> Finding:
    """A package that must have exactly the pinned version."""
    version, wanted = machine.version(package), machine.pinned(package)
    if version is None:
        return Finding(name=package, state=State.MISSING, mend=mend)
    if wanted is not None and version != wanted:
        return Finding(name=package, state=State.WRONG, found=f"{version}, needed: {wanted}", mend=mend)
    return Finding(name=package, state=State.OK, found=version)


def _plugins(machine: Machine) -> Finding:
    """SGLang finds Tandem's hooks by entry points, which only an installed package has."""
    absent = [name for group, name in PLUGINS if not machine.has_entry_point(group, name)]
    if not absent:
        return Finding(name="plugins", state=State.OK, found=f"of {DISTRIBUTION} {machine.version(DISTRIBUTION)}")
    mend = "pip install -e . --no-deps" if machine.in_checkout() else "pip install --force-reinstall --no-deps WHEEL"
    return Finding(name="plugins", state=State.MISSING, found=f"absent: {', '.join(absent)}", mend=mend)


def _driver(machine: Machine) -> Finding:
    mend = "install NVIDIA's driver of version 580 or newer (CUDA 13)"
    if not machine.has_library("libcuda.so.1"):
        return Finding(name="driver", state=State.MISSING, mend=mend)
    said = machine.run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    version = said.text.split("\n")[0] if said.status == 0 else "version unknown: nvidia-smi does not answer"
    return Finding(name="driver", state=State.OK, found=version)


def _devices(machine: Machine) -> Finding:
    said = machine.run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    names = said.text.splitlines() if said.status == 0 else []
    found = f"{len(names)} x {names[0]}" if names else ""
    return _finding("GPU", found, ok=bool(names), mend="use a machine with an NVIDIA GPU, or the engine on the CPU")


def _cuda_torch(machine: Machine, mend: str) -> Finding:
    """The library that only PyTorch's CUDA builds have shows the build without an import."""
    version = machine.version("torch")
    if version is None:
        return Finding(name="torch", state=State.MISSING, mend=mend)
    if not machine.has_package_file("torch", "lib", "libtorch_cuda.so"):
        return Finding(name="torch", state=State.WRONG, found=f"{version}, a build without CUDA", mend=mend)
    return Finding(name="torch", state=State.OK, found=f"{version}, with CUDA")


def _compiler(machine: Machine) -> Finding:
    """The stock engine compiles kernels at their first use."""
    path = machine.program("g++")
    return _finding("compiler", str(path or ""), ok=path is not None, mend="apt-get install g++")
