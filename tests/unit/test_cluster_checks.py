"""What `tandem up` checks before it starts a process: the directory of certificates, the collector's address."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.cli import checks
from tandem.cli.checks import check_spec
from tandem.cli.exit_status import _as_option
from tandem.cli.state import find_tls
from tandem.errors import ConfigError
from tandem.local_cluster.cluster import ClusterSpec
from tandem.local_cluster.consul import ClusterConsul
from tandem.testing.fake_model import write_fake_model
from tandem.tls.authority import issue_all


@pytest.fixture
def spec(tmp_path: Path) -> ClusterSpec:
    return ClusterSpec(model=write_fake_model(tmp_path / "model"), engine="simulated")


def refusal(spec: ClusterSpec) -> str:
    with pytest.raises(ConfigError) as refused:
        check_spec(spec)
    return _as_option(refused.value)


def test_complete_certificates_and_a_listening_collector_are_accepted(spec: ClusterSpec, tmp_path: Path) -> None:
    issue_all(tmp_path / "certs")
    with socket.create_server(("127.0.0.1", 0)) as collector:
        endpoint = f"127.0.0.1:{collector.getsockname()[1]}"
        check_spec(replace(spec, tls=tmp_path / "certs", otlp_endpoint=endpoint))


def test_a_directory_of_certificates_that_is_missing_is_named(spec: ClusterSpec) -> None:
    sentence = refusal(replace(spec, tls=Path("/nowhere")))
    assert sentence == "--tls: there is no directory /nowhere: create it with `tandem certs /nowhere`"
    with pytest.raises(ConfigError, match="tls: there is no directory /nowhere"):
        find_tls(Path("/nowhere"))


@pytest.mark.parametrize("name", ["registry.pem", "decode-key.pem", "client.pem", "ca.pem", "consul-key.pem"])
def test_a_missing_file_of_a_process_is_named(spec: ClusterSpec, tmp_path: Path, name: str) -> None:
    issue_all(tmp_path / "certs")
    (tmp_path / "certs" / name).unlink()
    sentence = refusal(replace(spec, tls=tmp_path / "certs", consul=ClusterConsul()))
    assert sentence.startswith(f"--tls: {tmp_path / 'certs' / name} cannot be read: No such file or directory")
    assert "tandem certs" in sentence


def test_a_damaged_file_is_named_and_one_that_no_process_uses_is_not_read(spec: ClusterSpec, tmp_path: Path) -> None:
    issue_all(tmp_path / "certs")
    (tmp_path / "certs" / "edge.pem").write_text("damaged")
    check_spec(replace(spec, tls=tmp_path / "certs"))
    (tmp_path / "certs" / "frontend.pem").write_text("damaged")
    assert "frontend.pem is damaged, or contains no certificate" in refusal(replace(spec, tls=tmp_path / "certs"))


@pytest.mark.parametrize("endpoint", ["a:b", "ftp://a:1", "http://a:1/v1/traces", ":4317"])
def test_a_malformed_collector_is_named(spec: ClusterSpec, endpoint: str) -> None:
    sentence = refusal(replace(spec, otlp_endpoint=endpoint))
    assert sentence.startswith("--otlp-endpoint: must be host:port, or an http or https URL without a path, not")


def test_a_collector_that_does_not_listen_is_named(spec: ClusterSpec) -> None:
    sentence = refusal(replace(spec, otlp_endpoint="127.0.0.1:1"))
    assert sentence.startswith("--otlp-endpoint: no collector listens at 127.0.0.1:1 (Connection refused): start it")


def test_an_installation_without_the_demo_model_asks_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "DEMO_MODEL", tmp_path / "tandem-demo")
    with pytest.raises(ConfigError, match="model: must be given: this installation has no demo model"):
        check_spec(ClusterSpec(model=tmp_path / "tandem-demo", engine="simulated"))
