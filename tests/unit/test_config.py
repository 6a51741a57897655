"""Settings of every process: precedence and error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tandem_decode.config import DecodeConfig
from tandem_frontend.config import FrontendConfig
from tandem_prefill.config import PrefillConfig
from tandem_registry.config import RegistryConfig

from tandem import config
from tandem.domain.worker import WorkerRole
from tandem.errors import ConfigError

NEEDED = ["--registry", "a:1", "--model", "m"]
PROGRAMS: dict[str, tuple[type[config.ServiceConfig], list[str]]] = {
    "tandem-registry": (RegistryConfig, []),
    "tandem-prefill": (PrefillConfig, NEEDED),
    "tandem-decode": (DecodeConfig, NEEDED),
    "tandem-frontend": (FrontendConfig, NEEDED),
}


def decode(*argv: str, **environ: str) -> DecodeConfig:
    return config.load(DecodeConfig, "tandem-decode", [*NEEDED, *argv], environ)


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "decode.toml"
    file.write_text('port = 1\nworker_id = "from-file"\nlog_level = "error"\n')
    loaded = decode("--config", str(file), "--port", "3", TANDEM_DECODE_PORT="2", TANDEM_DECODE_WORKER_ID="from-env")
    assert (loaded.port, loaded.worker_id, loaded.log_level, loaded.threads) == (3, "from-env", "error", 1)


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "decode.toml").write_text("threads = 4\n[engine_extra]\nchunked_prefill_size = 128\n")
    loaded = decode(TANDEM_DECODE_CONFIG=str(tmp_path / "decode.toml"))
    assert loaded.threads == 4
    assert loaded.engine_extra == {"chunked_prefill_size": 128}


@pytest.mark.parametrize(
    ("argv", "environ", "key"),
    [
        (["--port", "70000"], {}, "port"),
        (["--port", "x"], {}, "port"),
        (["--role", "prefill"], {}, "role"),
        (["--engine", "vllm"], {}, "engine"),
        (["--engine-extra", "{"], {}, "engine_extra"),
        (["--engine-extra", "[]"], {}, "engine_extra"),
        (["--registry", "nowhere"], {}, "registry"),
        (["--registry", "a:1,,b:2"], {}, "registry"),
        (["--registry", "a:0"], {}, "registry"),
        (["--worker-id", "a b"], {}, "worker_id"),
        (["--kv-capacity-tokens", "1"], {}, "kv_capacity_tokens"),
        (["--drain-timeout-s", "nan"], {}, "drain_timeout_s"),
        (["--config", "/nowhere.toml"], {}, "config"),
        ([], {"TANDEM_DECODE_PROT": "1"}, "prot"),
        ([], {"TANDEM_DECODE_PORT": ""}, "port"),
    ],
)
def test_a_wrong_value_names_its_key(argv: list[str], environ: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        decode(*argv, **environ)
    assert wrong.value.key == key
    assert wrong.value.exit_status == 2
    assert "\n" not in str(wrong.value)


def test_an_unknown_key_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "decode.toml").write_text("prot = 1\n")
    with pytest.raises(ConfigError) as wrong:
        decode("--config", str(tmp_path / "decode.toml"))
    assert wrong.value.key == "prot"


def test_a_missing_required_setting_is_named() -> None:
    with pytest.raises(ConfigError) as wrong:
        config.load(FrontendConfig, "tandem-frontend", ["--model", "m"], {})
    assert wrong.value.key == "registry"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_itself(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    config_type, argv = PROGRAMS[program]
    assert json.loads(config.effective(config.load(config_type, program, argv, {})))["host"] == "127.0.0.1"
    with pytest.raises(SystemExit) as ended:
        config.load(config_type, program, ["--help"], {})
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in config_type.model_fields:
        assert "--" + name.replace("_", "-") in shown


def test_several_registries() -> None:
    assert decode("--registry", "a:1, b:2").registry == ("a:1", "b:2")


def test_worker_settings_reach_the_engine() -> None:
    loaded: Any = decode("--role", "aggregated", "--dtype", "float32", "--threads", "2", "--engine-extra", '{"a": 1}')
    settings = loaded.engine_settings(loaded.worker_role)
    assert (settings.dtype, settings.threads, settings.extra, settings.model_name) == ("float32", 2, {"a": 1}, "m")
    assert settings.kv_events is None
    without: Any = decode("--role", "aggregated", "--kv-events", "false")
    assert without.engine_settings(without.worker_role).kv_events is False


TLS = ("tls_cert", "tls_key", "tls_ca")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("given", [("tls_cert",), ("tls_key",), ("tls_ca",), TLS[:2], TLS[1:], (TLS[0], TLS[2])])
def test_half_of_tls_names_what_is_missing(program: str, given: tuple[str, ...]) -> None:
    config_type, argv = PROGRAMS[program]
    prefix = program.upper().replace("-", "_")
    with pytest.raises(ConfigError) as wrong:
        config.load(config_type, program, argv, {f"{prefix}_{key.upper()}": "/x" for key in given})
    assert wrong.value.key == next(key for key in TLS if key not in given)
    assert "is missing" in str(wrong.value)


def test_all_of_tls_or_nothing() -> None:
    assert decode().tls is None
    tls = decode("--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a").tls
    assert tls is not None
    assert (tls.cert, tls.key, tls.ca) == (Path("c"), Path("k"), Path("a"))


@pytest.mark.parametrize(
    ("environ", "argv", "endpoint"),
    [
        ({}, [], None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4317/"}, [], "http://all:4317"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4317", "TANDEM_DECODE_OTLP_ENDPOINT": "https://own:1"},
            [],
            "https://own:1",
        ),
        ({"TANDEM_DECODE_OTLP_ENDPOINT": "https://own:1"}, ["--otlp-endpoint", "flag:2"], "http://flag:2"),
    ],
)
def test_a_collector_is_the_one_of_all_programs_unless_this_program_has_its_own(
    environ: dict[str, str], argv: list[str], endpoint: str | None
) -> None:
    assert decode(*argv, **environ).otlp_endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["http://", "ftp://a:1", "http://a:1/v1/traces", "a b", "a:0", "a:70000", "a:b"])
def test_a_collector_that_cannot_be_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        decode("--otlp-endpoint", endpoint)
    assert refused.value.key == "otlp_endpoint"
    assert "must be host:port, or an http or https URL without a path" in refused.value.message


def test_ucx_has_settings_of_its_own_and_takes_any_other_variable() -> None:
    extra = '{"IB_GID_INDEX": 3, "TCP_AF_PRIO": "inet6"}'
    loaded = decode("--ucx-net-devices", "eth1,mlx5_0:1", "--ucx-tls", "rc", "--ucx-extra", extra)
    assert loaded.engine_settings(WorkerRole.DECODE).ucx == {
        "UCX_NET_DEVICES": "eth1,mlx5_0:1",
        "UCX_TLS": "rc",
        "UCX_IB_GID_INDEX": "3",
        "UCX_TCP_AF_PRIO": "inet6",
    }
    assert decode().engine_settings(WorkerRole.DECODE).ucx == {}


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ('{"NET_DEVICES": "eth1"}', "ucx_extra.NET_DEVICES: has a setting of its own, ucx_net_devices"),
        ('{"UCX_TLS": "tcp"}', "ucx_extra.UCX_TLS: must be the name of a variable of UCX, without UCX_"),
        ('{"tcp": "x"}', "ucx_extra.tcp: must be the name of a variable of UCX, without UCX_"),
        ('{"TCP_AF_PRIO": true}', "ucx_extra.TCP_AF_PRIO: must be text or a number"),
        ('{"TCP_AF_PRIO": ["inet6"]}', "ucx_extra.TCP_AF_PRIO: must be text or a number"),
    ],
)
def test_a_wrong_variable_of_ucx_is_named(extra: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        decode("--ucx-extra", extra)
