"""A wrong setting is reported in one sentence before anything starts: settings, ports, directories, no cluster."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperOption

from tandem.cli.app import app
from tests.integration.support.command_line import SIMULATED, TANDEM, run

pytestmark = pytest.mark.timeout(60)

PROGRAMS = ("tandem_registry", "tandem_prefill", "tandem_decode", "tandem_frontend")


async def refused(state: Path, *arguments: str, cwd: Path | None = None) -> tuple[int | None, str]:
    """Exit status and the one sentence; nothing was started, and nothing is left."""
    ended, out, err = await run(*TANDEM, *arguments, state=state, cwd=cwd)
    assert not out
    assert len(err.strip().splitlines()) == 1, err
    assert not state.parent.exists()
    return ended, err.strip()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--frontends", "0"], "--frontends: must be at least 1, not 0"),
        (["--prefill", "-1"], "--prefill: must be at least 0, not -1"),
        (["--prefill", "two"], "'--prefill': must be a whole number"),
        (["--prefill", "0", "--decode", "0"], "--prefill: needs at least one prefill and one decode worker"),
        (
            ["--prefill", "1", "--decode", "0"],
            "--decode: must be at least 1: prefill and decode workers work only in pairs",
        ),
        (["--model", "/nowhere"], "--model: there is no directory /nowhere"),
        (["--model-name", ""], "--model-name: must be 1 to 128 characters long, not ''"),
        (["--engine", "vllm"], "--engine: must be sglang or simulated, not 'vllm'"),
        (["--device", "tpu"], "--device: must be auto, cpu or cuda, not 'tpu'"),
        (["--dtype", "int4"], "--dtype: must be auto, float32, bfloat16 or float16, not 'int4'"),
        (["--kv-capacity-tokens", "1"], "--kv-capacity-tokens: must be at least 64, not '1'"),
        (["--engine-extra", "{"], "--engine-extra: is not JSON: "),
        (["--engine-extra", "[]"], "--engine-extra: must be a JSON object"),
        (["--engine-extra", '{"speed": 1}'], "--engine-extra: speed: is not an option of the simulated engine"),
        (["--port", "65536"], "--port: must be 0 to 65535, not 65536"),
        (["--log-dir", "/dev/null"], "--log-dir: /dev/null, or a parent of it, is not a directory"),
        (["--log-dir", "/dev/null/x"], "--log-dir: /dev/null/x, or a parent of it, is not a directory"),
        (["--log-dir", "/proc/x"], "--log-dir: /proc/x cannot be created: "),
        (["--registries", "0"], "--registries: must be at least 1, not 0"),
        (["--registries", "2"], "--registries: more than one registry requires --consul"),
        (["--consul", "nowhere"], "--consul: must be host:port, or an http or https URL, not 'nowhere'"),
        (["--consul", "--consul-ca", "x"], "--consul-ca: requires --consul ADDRESS (an existing agent)"),
        (["--consul", "a:1", "--consul-token-file", "/nowhere"], "--consul-token-file: /nowhere cannot be read"),
        (["--tls", "/nowhere"], "--tls: there is no directory /nowhere: create it with `tandem certs /nowhere`"),
        (["--tls", "/"], "--tls: /registry.pem cannot be read: No such file or directory: `tandem certs /` creates"),
        (["--otlp-endpoint", "a:b"], "--otlp-endpoint: must be host:port, or an http or https URL without a path"),
        (
            ["--otlp-endpoint", "127.0.0.1:1"],
            "--otlp-endpoint: no collector listens at 127.0.0.1:1 (Connection refused)",
        ),
        (["--bogus"], "No such option: --bogus"),
    ],
)
async def test_a_wrong_setting_of_up_names_its_flag(state: Path, options: list[str], sentence: str) -> None:
    ended, err = await refused(state, "up", *SIMULATED, *options)
    assert ended == 2
    assert err.startswith("tandem up: ")
    assert sentence in err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('engine = "simulated"\nprefill = "two"', "line 2: prefill: must be a whole number"),
        ("\n# none\nfrontends = 0", "line 3: frontends: must be at least 1, not 0"),
        ('"engine_extra" = "{"', "line 1: engine_extra: is not JSON: "),
        ("consul = true\nregistries = 0", "line 2: registries: must be at least 1, not 0"),
        ("decode = 1\nbogus = 1", "line 2: bogus is not an option of `tandem up`"),
        ("[engine]\nextra = 1", "line 1: engine must be a text or a number"),
        ("config = 'other.toml'", "line 1: config is not an option of `tandem up`"),
        ("edge = 1", "line 1: edge must be true or false"),
        ("prefill = true", "line 1: prefill must be a text or a number"),
        ("engine = 'simulated", " cannot be read: "),
    ],
)
async def test_a_wrong_setting_in_a_file_of_up_names_its_line(
    state: Path, tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "up.toml").write_text(text)
    ended, err = await refused(state, "up", "--config", str(tmp_path / "up.toml"))
    assert ended == 2
    assert err.startswith("tandem up: ")
    assert str(tmp_path / "up.toml") in err
    assert sentence in err


async def test_a_flag_overrides_the_file_of_up_and_is_named_itself(state: Path, tmp_path: Path) -> None:
    (tmp_path / "up.toml").write_text("frontends = 0\nport = 65536")
    ended, err = await refused(state, "up", *SIMULATED, "--config", str(tmp_path / "up.toml"), "--frontends", "-1")
    assert (ended, err) == (2, "tandem up: --frontends: must be at least 1, not -1")


async def test_every_option_of_up_may_stand_in_a_file(tmp_path: Path) -> None:
    command = typer.main.get_group(app).commands["up"]
    options = [option for option in command.params if isinstance(option, TyperOption) and option.name != "config"]
    lines = (f"{option.name} = {'true' if option.is_flag else 1}" for option in options)
    (tmp_path / "up.toml").write_text("\n".join(lines))
    context = command.make_context("up", ["--config", str(tmp_path / "up.toml")])
    assert context.default_map is not None
    assert set(context.default_map) == {option.name for option in options}
    assert all(context.get_parameter_source(option.name or "").name == "DEFAULT_MAP" for option in options)  # type: ignore[union-attr]


async def test_the_demo_checks_too(state: Path) -> None:
    assert await refused(state, "demo", *SIMULATED, "--engine", "vllm") == (
        2,
        "tandem demo: --engine: must be sglang or simulated, not 'vllm'",
    )


async def test_a_port_in_use_is_reported_before_anything_starts(state: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("--port", "--http-port"):
            ended, err = await refused(state, "up", *SIMULATED, flag, str(port))
            assert ended == 2
            assert f"{flag}: cannot listen on 127.0.0.1:{port} (the port is in use); 0 selects a free port" in err
        ended, out, err = await run(sys.executable, "-m", "tandem_registry", "--port", str(port), state=state)
    assert (ended, out) == (1, "")
    said = [line for line in err.splitlines() if '"level": "INFO"' not in line]
    assert said == [f"tandem-registry: cannot listen on 127.0.0.1:{port}: the port is in use"]


async def test_a_damaged_model_is_reported_before_anything_starts(state: Path, tmp_path: Path) -> None:
    ended, err = await refused(state, "up", "--engine", "simulated", "--model", str(tmp_path))
    assert ended == 1
    assert err == f"tandem up: {tmp_path / 'config.json'} is missing"


async def test_nothing_runs_here(state: Path) -> None:
    for command in (["generate", "x"], ["status"]):
        ended, err = await refused(state, *command)
        assert ended == 1
        assert "start one with `tandem up`" in err


async def test_a_stale_state_file_is_reported(state: Path) -> None:
    gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await gone.wait()
    state.parent.mkdir()
    where = {"frontend": "127.0.0.1:1", "registry": "127.0.0.1:1", "model": "m", "log": "/"}
    state.write_text(json.dumps({"pid": gone.pid, **where}))
    status, _, err = await run(*TANDEM, "generate", "x", state=state)
    assert status == 1
    assert "has stopped" in err


async def test_a_prompt_that_is_not_utf8_is_reported(state: Path) -> None:
    status, _, err = await run(*TANDEM, "generate", "-", state=state, stdin=b"Hi \xff")
    assert status == 2
    assert err == "tandem generate: Invalid value: standard input is not UTF-8 (byte 3)\n"


@pytest.mark.parametrize("module", PROGRAMS)
async def test_a_wrong_setting_of_a_program_exits_2_and_names_it(state: Path, module: str) -> None:
    ended, _, err = await run(sys.executable, "-m", module, "--port", "99999", state=state)
    assert ended == 2
    name = module.replace("_", "-")
    assert re.fullmatch(rf"{name}: (port: must be 0 to 65535|registry: must be given).*\n", err)


@pytest.mark.parametrize("module", ["tandem_prefill", "tandem_frontend"])
async def test_a_missing_model_of_a_program_is_a_wrong_setting(state: Path, module: str) -> None:
    arguments = ["--registry", "127.0.0.1:1", "--model", "/nowhere"]
    arguments += ["--engine", "simulated"] if module == "tandem_prefill" else []
    ended, _, err = await run(sys.executable, "-m", module, *arguments, state=state)
    assert ended == 2
    assert err.splitlines()[-1] == f"{module.replace('_', '-')}: model: there is no directory /nowhere"
