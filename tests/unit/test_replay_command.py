"""`tandem replay`: its table, files, exit status and messages."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.replay.made_traces import conversations, write
from tandem.cli.app import run

FLEET = """
[prefill]
count = 2
cache_blocks = 200
[decode]
count = 1
[engine]
prefill_tokens_per_s = 9000
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    return str(write(conversations(30, seed=4), tmp_path / "trace.jsonl")), str(fleet)


def replay(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["tandem", "replay", *arguments])
    return run()


def test_a_replay_prints_a_table_and_writes_its_figures(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, fleet = files
    written = tmp_path / "figures.json"
    arguments = (trace, "--fleet", fleet, "--policy", "random,oracle", "--utilisation", "0.7", "--json", str(written))
    assert replay(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    for words in ("busy for 70%", "TTFT mean", "ITL p99", "hit rate", "prompt tokens/s", "prefill-1", "decode-0"):
        assert words in printed.out
    assert printed.err == ""
    first = written.read_bytes()
    figures = json.loads(first)
    assert [one["policy"] for one in figures["policies"]] == ["random", "oracle"]
    assert figures["policies"][0]["ttft_s"]["mean"] > figures["policies"][1]["ttft_s"]["mean"] > 0
    assert figures["settings"]["utilisation_without_cache"] == 0.7
    assert replay(monkeypatch, *arguments) == 0
    assert written.read_bytes() == first


def test_tables_in_a_pipe_are_not_cut_to_a_width(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    trace, fleet = files
    policies = "random,power_of_two,least_work,prefix,session,oracle"
    assert replay(monkeypatch, trace, "--fleet", fleet, "--policy", policies) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "busiest prefill / mean, busy time" in printed


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_replay_plots(files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    pytest.importorskip("matplotlib")
    trace, fleet = files
    plots = [tmp_path / f"{number}.{ending}" for number in (1, 2)]
    for plot in plots:
        assert replay(monkeypatch, trace, "--fleet", fleet, "--plot", str(plot)) == 0
    assert plots[0].read_bytes() == plots[1].read_bytes()
    if ending == "svg":
        assert ElementTree.parse(plots[0]).getroot().tag.endswith("svg")
    else:
        assert plots[0].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "fastest"), "--policy: must be some of auto, random, "),
        (("--policy", "random,"), "--policy: must be some of auto, random, "),
        (("--load", "0"), "--load: must be above 0, at most 1000, not 0"),
        (("--utilisation", "-1"), "--utilisation: must be above 0, at most 1000, not -1"),
        (("--plot", "figures.pdf"), "--plot: must be a file that ends in .png or .svg, not figures.pdf"),
        (("--json", "/nowhere/figures.json"), "--json: /nowhere/figures.json cannot be written"),
    ],
)
def test_a_wrong_option_is_named(
    files: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert replay(monkeypatch, files[0], "--fleet", files[1], *arguments) == 2
    assert capsys.readouterr().err.startswith(f"tandem replay: {message}")


def test_a_wrong_field_and_a_broken_line_are_named(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, fleet = files
    Path(fleet).write_text(FLEET + "[frontends]\ncount = 2\n")
    assert replay(monkeypatch, trace, "--fleet", fleet) == 2
    assert "tandem replay: --fleet: frontends: is no field; fields are " in capsys.readouterr().err
    Path(fleet).write_text(FLEET)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(trace).read_text() + '{"timestamp": 1}\n')
    lines = len(broken.read_text().splitlines())
    assert replay(monkeypatch, str(broken), "--fleet", fleet) == 2
    assert f"{broken}, line {lines}: input_length must be a whole number" in capsys.readouterr().err
