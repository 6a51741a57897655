"""requirements/constraints.txt: the one version of every package that a set-up installs."""

from __future__ import annotations

import importlib.util
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.gen_constraints import FILE, listed, pins
from tools.markdown import ROOT
from tools.setup_environment import CONSTRAINTS, LISTED, TORCH, WITHOUT_DEPENDENCIES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [*PROJECT["dependencies"], *(text for texts in PROJECT["optional-dependencies"].values() for text in texts)]
SET_UP = (TORCH, *LISTED, *WITHOUT_DEPENDENCIES)
LOCKED = {canonicalize_name(one.name): one for one in listed(FILE.name)}


def locked_version(name: str) -> str:
    [exact] = LOCKED[canonicalize_name(name)].specifier
    assert exact.operator == "=="
    return exact.version


@pytest.mark.parametrize("text", DIRECT)
def test_a_dependency_of_the_project_allows_the_version(text: str) -> None:
    wanted = Requirement(text)
    assert wanted.specifier.contains(locked_version(wanted.name), prereleases=True)


@pytest.mark.parametrize("file", SET_UP)
def test_a_file_of_the_set_up_names_the_same_versions(file: str) -> None:
    for wanted in listed(file):
        assert str(wanted.specifier) == f"=={locked_version(wanted.name)}", wanted.name


def test_every_version_is_also_in_a_file_of_the_set_up() -> None:
    names = {canonicalize_name(one.name) for file in SET_UP for one in listed(file)}
    assert set(LOCKED) - names == set()


def test_no_version_names_one_build_of_torch() -> None:
    assert "+" not in locked_version("torch")
    assert [name for name in LOCKED if name.startswith(("nvidia-", "cuda-", "triton"))] == []


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt")
def test_what_is_installed_needs_no_other_package() -> None:
    # On another Python some packages need fewer others, so what is installed may be less than the file has.
    assert {name: version for name, version in pins().items() if version != locked_version(name)} == {}


def test_the_set_up_uses_the_file() -> None:
    assert CONSTRAINTS == ("-c", FILE)
