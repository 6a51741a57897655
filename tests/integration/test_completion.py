"""Shell completion as a shell does it: bash sources the script and asks the real command on Tab."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import typer.main
from typer.core import TyperOption

from tandem.cli.app import app
from tandem.cli.completion import SHELLS

ROLES = ["prefill", "decode", "aggregated"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a `tandem` of this tree in front."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "tandem"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tandem.cli "$@"\n')
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run(path: str, *command: str, **variables: str) -> str:
    ended = subprocess.run(
        command, env={**os.environ, "PATH": path, **variables}, capture_output=True, text=True, check=True, timeout=100
    )
    return ended.stdout


def bash_completes(path: str, *words: str) -> list[str]:
    """What bash offers for the last word, which may be empty."""
    script = (
        'source <(tandem completion bash)\nCOMP_WORDS=("$@")\nCOMP_CWORD=$(($# - 1))\n'
        # The function that `complete` has registered for the program, as bash calls it on Tab.
        "registered=$(complete -p tandem)\n[[ $registered =~ -F\\ ([a-z_]+) ]] || exit 3\n"
        '"${BASH_REMATCH[1]}" tandem "${COMP_WORDS[COMP_CWORD]}" ""\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    return run(path, "bash", "-c", script, "bash", *words).split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tandem", "do"), ["doctor"]),
        (("tandem", "doctor", "c"), ["cpu", "consul", "containers"]),
        (("tandem", "role", "decode-0", ""), ROLES),
        (("tandem", "up", "--engine", "s"), ["sglang", "simulated"]),
        (("tandem", "up", "--frontend-p"), ["--frontend-processes"]),
    ],
)
def test_bash_offers_what_fits(path: str, words: tuple[str, ...], offered: list[str]) -> None:
    assert bash_completes(path, *words) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_every_command_and_option(path: str) -> None:
    commands = typer.main.get_group(app).commands
    assert set(bash_completes(path, "tandem", "")) == set(commands)
    options = {name for option in commands["up"].params if isinstance(option, TyperOption) for name in option.opts}
    assert options <= set(bash_completes(path, "tandem", "up", "--"))


@pytest.mark.parametrize(
    ("shell", "variables", "shown"),
    [
        ("zsh", {"_TYPER_COMPLETE_ARGS": "tandem doc"}, '"doctor":"Check what this machine'),
        ("fish", {"_TYPER_COMPLETE_ARGS": "tandem doc", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}, "doctor\t"),
    ],
)
def test_other_shells_get_their_script_and_answers(
    path: str, shell: str, variables: dict[str, str], shown: str
) -> None:
    assert f"_TANDEM_COMPLETE=complete_{shell}" in run(path, "tandem", "completion", shell)
    assert shown in run(path, "tandem", _TANDEM_COMPLETE=f"complete_{shell}", **variables)


def test_an_unknown_shell_is_refused(path: str) -> None:
    ended = subprocess.run(
        ["tandem", "completion", "tcsh"], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == f"tandem completion: SHELL: must be one of {', '.join(SHELLS)}, not 'tcsh'\n"
