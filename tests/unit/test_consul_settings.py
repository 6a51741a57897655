"""Consul settings: each error is raised at the start and names its setting; tokens are never printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tandem_registry.backends.consul.settings import ConsulSettings
from tandem_registry.config import RegistryConfig

from tandem import config
from tandem.config import load
from tandem.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("127.0.0.1:8500", ("http", "127.0.0.1", 8500)),
        ("consul", ("http", "consul", 8500)),
        ("http://consul:1/", ("http", "consul", 1)),
        ("https://consul", ("https", "consul", 8501)),
        ("https://[::1]:9", ("https", "[::1]", 9)),
    ],
)
def test_addresses(address: str, endpoint: tuple[str, str, int]) -> None:
    assert ConsulSettings(address=address).endpoint() == endpoint


@pytest.mark.parametrize(
    "address",
    ["", "ftp://consul", "http://", "consul:port", "consul:99999", "http://consul/v1", "http://me:word@consul"],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        ConsulSettings(address=address).endpoint()
    assert wrong.value.key == "consul_address"
    assert "word" not in str(wrong.value)


def test_a_password_in_the_address_is_refused_before_settings_are_logged() -> None:
    with pytest.raises(ConfigError) as wrong:
        load(RegistryConfig, "tandem-registry", ["--consul-address", "http://me:word@consul"], {})
    assert wrong.value.key == "consul_address"
    assert "word@" not in str(wrong.value)


def test_a_token_comes_from_its_file_each_time_it_is_read(tmp_path: Path) -> None:
    settings = ConsulSettings(token_file=(file := tmp_path / "token"))
    for content in (None, "", "two words", "line\x00"):
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigError) as wrong:
            settings.read_token()
        assert wrong.value.key == "consul_token_file"
        assert not content or content not in str(wrong.value)
    file.write_text("secret-1\n")
    assert settings.read_token() == "secret-1"
    file.write_text("secret-2\n")
    assert settings.read_token() == "secret-2"


def test_a_file_of_tls_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (junk := tmp_path / "junk.pem").write_text("junk")
    wrongs: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ca": tmp_path / "none.pem"}, "consul_ca"),
        ({"ca": junk}, "consul_ca"),
        ({"cert": junk, "key": junk}, "consul_cert"),
    )
    for more, key in wrongs:
        with pytest.raises(ConfigError) as wrong:
            ConsulSettings(address="https://consul", **more).tls_context()
        assert wrong.value.key == key


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"consul_service": "Not_a_label"}, "consul_service"),
        ({"consul_token": "a", "consul_token_file": "b"}, "consul_token_file"),
        ({"consul_cert": "a"}, "consul_key"),
        ({"consul_key": "a"}, "consul_cert"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], key: str) -> None:
    argv = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    with pytest.raises(ConfigError) as wrong:
        config.load(RegistryConfig, "tandem-registry", argv, {})
    assert wrong.value.key == key


def test_a_token_is_shown_nowhere() -> None:
    loaded = config.load(RegistryConfig, "tandem-registry", [], {"TANDEM_REGISTRY_CONSUL_TOKEN": "secret-1"})
    assert loaded.consul_token is not None
    assert loaded.consul_token.get_secret_value() == "secret-1"
    assert "secret-1" not in config.effective(loaded)
    assert "secret-1" not in repr(loaded)
    assert "secret-1" not in repr(ConsulSettings(token="secret-1"))
