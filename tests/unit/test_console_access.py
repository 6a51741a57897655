"""Who may use the console: keys of a file that changes, and pages of its own origin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from tandem_frontend.config import FrontendConfig
from tandem_frontend.console.access import ConsoleKeys, is_own_page
from tandem_frontend.processes.parent import settings_of

from tandem.cli import console_access
from tandem.errors import ConfigError

KEY = "k" * 24
OTHER = "o" * 24


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "console.keys"
    file.write_text(f"ops: {KEY} requests_per_minute=9\n")
    file.chmod(0o600)
    return file


def test_keys_find_the_client_and_its_quota(file: Path) -> None:
    found = ConsoleKeys(file).find(f"Bearer {KEY}")
    assert found is not None
    assert (found.client_id, found.quota.requests_per_minute) == ("ops", 9)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", f"Bearer {OTHER}", KEY, f"Basic {KEY}", f"Bearer {KEY[:-1]}", "Bearer \udc80\x00"],
)
def test_keys_refuse_what_is_no_key_of_the_file(file: Path, value: str) -> None:
    assert ConsoleKeys(file).find(value) is None


def test_keys_follow_the_file_and_keep_the_last_ones_that_could_be_read(file: Path) -> None:
    keys = ConsoleKeys(file)
    file.write_text(f"ops: {OTHER}\n")
    assert (keys.find(f"Bearer {KEY}"), keys.find(f"Bearer {OTHER}") is not None) == (None, True)
    file.write_text("ops: short\n")
    assert keys.find(f"Bearer {OTHER}") is not None
    file.unlink()
    assert keys.find(f"Bearer {OTHER}") is not None


@pytest.mark.parametrize("text", ["", "# nothing\n", "ops: short\n", f"not a client: {KEY}\n"])
def test_keys_of_an_unusable_file_name_the_setting_and_no_key(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match="console_keys") as caught:
        ConsoleKeys(file)
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match="console_keys"):
        ConsoleKeys(file.with_name("missing"))


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1:9"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://127.0.0.1:8"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://["}, False),
    ],
)
def test_a_call_of_another_origin_is_recognised(headers: Mapping[str, str], is_own: bool) -> None:
    assert is_own_page(headers, "127.0.0.1:9") == is_own


def settings(**more: object) -> FrontendConfig:
    return FrontendConfig.model_validate({"registry": "a:1", "model": "m", **more})


def test_settings_of_the_console_belong_together() -> None:
    with pytest.raises(ConfigError, match="console_keys"):
        settings(console_port=1)
    with pytest.raises(ConfigError, match="console_port"):
        settings(console_keys="f")
    with pytest.raises(ConfigError, match="console_port: must not be 0"):
        settings(console_port=0, console_keys="f", processes=2)


def test_console_of_several_processes_is_served_by_the_first() -> None:
    config = settings(console_port=7, console_keys="f", processes=3)
    assert [settings_of(config, number).console_port for number in range(3)] == [7, None, None]
    for number in range(3):
        FrontendConfig.model_validate(settings_of(config, number).model_dump(mode="json"))


def test_key_of_a_local_cluster_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    access = console_access.prepare(tmp_path / "state", "127.0.0.1", 0)
    assert access.port > 0
    assert access.keys.stat().st_mode & 0o077 == 0
    key = console_access.key_of(access.keys)
    assert ConsoleKeys(access.keys).find(f"Bearer {key}") is not None
    again = console_access.prepare(tmp_path / "state", "127.0.0.1", 4711)
    assert (again.port, console_access.key_of(again.keys)) == (4711, key)
    assert console_access.prepare(tmp_path / "other", "127.0.0.1", 1).keys.read_text() != access.keys.read_text()
