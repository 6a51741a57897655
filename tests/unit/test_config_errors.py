"""Text about settings: plain, with the allowed values, and never the value of another setting."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tandem_decode.config import DecodeConfig
from tandem_edge.config import EdgeConfig
from tandem_frontend.config import FrontendConfig
from tandem_prefill.config import PrefillConfig
from tandem_registry.config import RegistryConfig

from tandem import config, config_errors
from tandem.errors import ConfigError

TYPES = (DecodeConfig, FrontendConfig, PrefillConfig, RegistryConfig, EdgeConfig)
NEEDED = ["--registry", "a:1", "--model", "m"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--engine", "vllm"], "engine: must be sglang or simulated, not 'vllm'"),
        (["--dtype", "int4"], "dtype: must be auto, float32, bfloat16 or float16, not 'int4'"),
        (["--port", "70000"], "port: must be 0 to 65535, not '70000'"),
        (["--port", "x"], "port: must be a whole number, 0 to 65535, not 'x'"),
        (["--seed", "-1"], "seed: must be at least 0, not '-1'"),
        (["--canary-timeout-s", "0"], "canary_timeout_s: must be above 0, at most 600, not '0'"),
        (["--drain-timeout-s", "nan"], "drain_timeout_s: must be 0 to 3600, not 'nan'"),
        (["--model-name", ""], "model_name: must be 1 to 128 characters long, not ''"),
        (["--registry", "nowhere"], "registry: 'nowhere' is neither host:port nor srv://NAME@HOST:PORT"),
        (["--engine-extra", "[]"], "engine_extra: must be a JSON object"),
    ],
)
def test_a_mistake_is_one_plain_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        config.load(DecodeConfig, "tandem-decode", [*NEEDED, *argv], {})
    assert str(wrong.value) == sentence


def test_the_text_of_a_missing_setting_shows_no_other_value() -> None:
    with pytest.raises(ConfigError) as wrong:
        config.load(FrontendConfig, "tandem-frontend", ["--model", "/secret"], {})
    assert str(wrong.value) == "registry: must be given"


def test_only_what_is_there_is_offered() -> None:
    with pytest.raises(ConfigError) as wrong:
        config.load(RegistryConfig, "tandem-registry", ["--backend", "etcd"], {})
    assert str(wrong.value) == "backend: must be memory or consul, not 'etcd'"


@pytest.mark.parametrize("config_type", TYPES)
def test_help_has_one_default_and_a_telling_value(config_type: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name, field in config_type.model_fields.items():
        words = config_errors.explanation(field)
        assert words.count("default:") <= 1
        assert "None" not in words
        assert config_errors.metavar(name, field) not in ("", "VALUE")
    with pytest.raises(SystemExit):
        config.load(config_type, "tandem-x", ["--help"], {})
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--advertise-host HOST host under which other processes reach this one; default: host --" in shown
    assert "--drain-settle-s SECONDS" in shown
    assert "--port N" in shown


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--routing-policy", "round_robin"],
            "routing_policy: must be auto, random, power_of_two, least_work, prefix or session, not 'round_robin'",
        ),
        (["--session-header", "X Chat"], "session_header: must be of the form"),
    ],
)
def test_a_wrong_routing_setting_is_named(argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        config.load(FrontendConfig, "tandem-frontend", [*NEEDED, *argv], {})
    assert str(wrong.value).startswith(sentence)
