"""Consul options of `tandem up`: optional address, files, and a token that is never printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.cli.arguments import with_value
from tandem.cli.consul_options import check_consul, read_options
from tandem.errors import ConfigError, StartError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.local_cluster.consul import ClusterConsul
from tandem.local_cluster.consul_http import ConsulAccess, read_token_file

SECRET = "2f3b9a7e-a-token"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("up --consul", "up --consul local"),
        ("up --consul --prefill 2", "up --consul local --prefill 2"),
        ("up --consul 10.0.0.1:8500 --prefill 2", "up --consul 10.0.0.1:8500 --prefill 2"),
        ("up --consul=10.0.0.1:8500", "up --consul=10.0.0.1:8500"),
        ("generate --consul", "generate --consul"),
        ("", ""),
    ],
)
def test_consul_address_is_optional(given: str, read: str) -> None:
    assert with_value(given.split()) == read.split()


@pytest.mark.parametrize(
    ("address", "options", "key", "words"),
    [
        ("localhost", {}, "consul", "must be host:port, or an http or https URL"),
        ("ftp://localhost:1", {}, "consul", "must be host:port"),
        ("http://user:secret@localhost:1", {}, "consul", "must be host:port"),
        (None, {"token_file": Path("x")}, "consul_token_file", "requires --consul ADDRESS (an existing agent)"),
        ("local", {"ca": Path("x")}, "consul_ca", "requires --consul ADDRESS (an existing agent)"),
        (None, {"service": "other"}, "consul_service", "requires --consul"),
        ("local", {"service": "Not a name"}, "consul_service", "must be a DNS label"),
        ("a:1", {"cert": Path("c")}, "consul_key", "is missing"),
        ("a:1", {"key": Path("k")}, "consul_cert", "is missing"),
        ("a:1", {"cert": Path("c"), "key": Path("k")}, "consul_ca", "is missing"),
    ],
)
def test_an_invalid_consul_option_is_named(address: str | None, options: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_options(address, environ={}, **options)
    assert refused.value.key == key
    assert words in str(refused.value)


def test_variables_of_consuls_own_tools_are_read_for_an_agent_that_runs() -> None:
    environ = {"CONSUL_HTTP_TOKEN": SECRET, "CONSUL_HTTP_TOKEN_FILE": "/a/file"}
    assert read_options("a:1", environ=environ) == ClusterConsul(address="a:1", token=SECRET)
    by_file = read_options("a:1", environ={"CONSUL_HTTP_TOKEN_FILE": "/a/file"})
    assert by_file == ClusterConsul(address="a:1", token_file=Path("/a/file"))
    assert read_options("a:1", environ=environ, token_file=Path("f")) == ClusterConsul(
        address="a:1", token_file=Path("f")
    )
    assert read_options("local", environ=environ) == ClusterConsul()
    assert read_options(None, environ=environ) is None


def test_a_token_is_in_the_environment_of_registries_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", SECRET)
    consul = ClusterConsul(address="a:1", token=SECRET)
    spec = ClusterSpec(model=tmp_path, log_directory=tmp_path, registries=2, consul=consul, edge=True)
    assert SECRET not in repr(spec)
    cluster = LocalCluster(spec)
    holders = [p.name for p in cluster.processes if SECRET in p._environment(tmp_path).values()]
    assert holders == ["registry-0", "registry-1"]
    assert not [p.name for p in cluster.processes if any(SECRET in word for word in p._command())]


def test_only_registries_get_the_consul_address(tmp_path: Path) -> None:
    consul = ClusterConsul(address="https://a:1", service="blue", token_file=tmp_path / "token")
    tls = tmp_path / "certs"
    cluster = LocalCluster(
        ClusterSpec(model=tmp_path, log_directory=tmp_path, registries=2, consul=consul, tls=tls, edge=True)
    )
    expected = {
        "backend": "consul",
        "consul-address": "https://a:1",
        "consul-service": "blue",
        "consul-token-file": str(tmp_path / "token"),
        "consul-ca": str(tls / "ca.pem"),
        "consul-cert": str(tls / "registry.pem"),
        "consul-key": str(tls / "registry-key.pem"),
    }
    for process in cluster.processes:
        found = {key: value for key, value in process.flags.items() if "consul" in key or key == "backend"}
        assert found == (expected if process.role == "registry" else {}), process.name
    assert cluster.dns_name("decode") == "decode.blue.service.consul"


def test_a_local_agent_starts_first_with_the_tls_of_the_cluster(tmp_path: Path) -> None:
    cluster = LocalCluster(ClusterSpec(model=tmp_path, log_directory=tmp_path, consul=ClusterConsul()))
    assert [process.name for process in cluster.processes][:2] == ["consul", "registry"]
    assert cluster.consul is not None
    assert cluster.registry.flags["consul-address"] == f"127.0.0.1:{cluster.consul.ports.http}"
    secure = LocalCluster(
        ClusterSpec(model=tmp_path, log_directory=tmp_path, consul=ClusterConsul(), tls=tmp_path / "certs")
    )
    assert secure.consul is not None
    assert secure.registry.flags["consul-address"] == f"https://127.0.0.1:{secure.consul.ports.http}"
    assert secure.registry.flags["consul-ca"] == str(tmp_path / "certs" / "ca.pem")


@pytest.mark.parametrize("content", ["", " \n", "two words", "\x00", "naïve"])
def test_a_file_without_a_token_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(StartError, match="token contains no valid token"):
        read_token_file(tmp_path / "token")


async def test_an_unreachable_agent_is_rejected_before_anything_starts(tmp_path: Path) -> None:
    from rich.console import Console

    spec = ClusterSpec(model=tmp_path, consul=ClusterConsul(address="127.0.0.1:1"))
    with pytest.raises(StartError, match=r"Consul at 127\.0\.0\.1:1 is unreachable: Connection refused"):
        await check_consul(spec, Console())
    spec = ClusterSpec(model=tmp_path, consul=ClusterConsul(address="a:1", token_file=tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"consul_token_file: .*none cannot be read"):
        await check_consul(spec, Console())


async def test_a_server_that_is_not_consul_gives_one_sentence() -> None:
    with pytest.raises(StartError, match="neither host:port nor"):
        await ConsulAccess(address="file:///etc/passwd").get("/v1/status/leader")
