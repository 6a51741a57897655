"""`tandem certs`: contents of the certificates, strict verification, renewal, and rejected input."""

from __future__ import annotations

import ipaddress
import os
import shutil
import ssl
import stat
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tandem.errors import ConfigError, StartError
from tandem.tls.authority import CA_DAYS, DAYS_MAX, NAMES, issue_all
from tandem.tls.paths import Tls


def read(directory: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes())


def names_of(certificate: x509.Certificate) -> set[str]:
    value = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*value.get_values_for_type(x509.DNSName), *map(str, value.get_values_for_type(x509.IPAddress))}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    issue_all(tmp_path / "certs")
    return tmp_path / "certs"


def test_every_role_gets_a_certificate_and_a_key_of_its_own(directory: Path) -> None:
    assert {file.name for file in directory.iterdir()} == {
        f"{name}{end}" for name in ("ca", *NAMES) for end in (".pem", "-key.pem")
    }
    for name in ("ca", *NAMES):
        assert stat.S_IMODE((directory / f"{name}-key.pem").stat().st_mode) == 0o600
        key = read(directory, name).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)
    assert len({read(directory, name).serial_number for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_certificate_says_what_it_is_for(directory: Path, name: str) -> None:
    certificate = read(directory, name)
    names = {"localhost", "127.0.0.1", "::1", name, f"{name}.tandem.service.consul"}
    # By this one Consul's servers know each other: no other process may hold it.
    assert names_of(certificate) == names | ({"server.dc1.consul"} if name == "consul" else set())
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_openssl_accepts_it_strictly(directory: Path, name: str, purpose: str) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem", f"{name}.pem"]
    verified = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert verified.stdout == f"{name}.pem: OK\n", verified.stderr


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "registry.tandem.service.consul"])
def test_python_shakes_hands_with_it_strictly(directory: Path, host: str) -> None:
    sides = {name: Tls.in_directory(directory, name) for name in ("registry", "client")}
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(sides["registry"].ca))
    server.load_cert_chain(sides["registry"].cert, sides["registry"].key)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(sides["client"].ca))
    client.load_cert_chain(sides["client"].cert, sides["client"].key)
    server.verify_flags |= ssl.VERIFY_X509_STRICT
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for end in (*ends, *ends):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    presented = [end.getpeercert()["serialNumber"] for end in ends]  # type: ignore[index]
    assert [int(serial, 16) for serial in presented] == [  # type: ignore[arg-type]
        read(directory, "registry").serial_number,
        read(directory, "client").serial_number,
    ]


def test_hosts_are_entered_and_stay_until_others_are_given(directory: Path) -> None:
    issue_all(directory, ["gpu-7.example.org", "10.1.2.3", "localhost"])
    own = names_of(read(directory, "decode"))
    assert {"gpu-7.example.org", "10.1.2.3", "decode"} <= own
    issue_all(directory)
    assert names_of(read(directory, "decode")) == own
    issue_all(directory, ["fd00::7"])
    assert names_of(read(directory, "decode")) == own - {"gpu-7.example.org", "10.1.2.3"} | {"fd00::7"}


def test_again_keeps_the_ca_and_renews_the_rest(directory: Path) -> None:
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    issued = issue_all(directory)
    after = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"ca.pem", "ca-key.pem"}
    assert {one.name: one.serial_number for one in issued} == {
        name: read(directory, name).serial_number for name in NAMES
    }


def test_a_file_is_replaced_whole(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that opened the former file reads it to its end, and a failed write leaves it in place."""
    file = directory / "decode.pem"
    before = file.read_bytes()
    with file.open("rb") as reader:
        assert reader.read(10)
        issue_all(directory)
        assert reader.read() == before[10:]
    present = {one.name: one.read_bytes() for one in directory.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StartError, match="No space left"):
        issue_all(directory)
    assert {one.name: one.read_bytes() for one in directory.iterdir()} == present


def test_validity_is_what_was_asked_for_and_never_longer_than_the_ca(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    issue_all(tmp_path, days=7)
    left = read(tmp_path, "edge").not_valid_after_utc - now
    assert abs(left - timedelta(days=7)) < timedelta(minutes=1)
    issue_all(tmp_path, days=DAYS_MAX, now=now + timedelta(days=CA_DAYS - 10))
    assert read(tmp_path, "edge").not_valid_after_utc == read(tmp_path, "ca").not_valid_after_utc
    with pytest.raises(StartError, match=r"ca\.pem has expired"):
        issue_all(tmp_path, now=now + timedelta(days=CA_DAYS + 1))


@pytest.mark.parametrize("days", [-1, 0, DAYS_MAX + 1])
def test_days_out_of_range(tmp_path: Path, days: int) -> None:
    with pytest.raises(ConfigError) as wrong:
        issue_all(tmp_path, days=days)
    assert wrong.value.key == "days"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["", "a b", "http://x", "x:1", "-a", "a..b", "a" * 64, "*", "naïve.org", "a\n"])
def test_a_host_that_is_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        issue_all(tmp_path, [host])
    assert wrong.value.key == "host"


@pytest.mark.parametrize("host", ["*.example.org", "gpu_7", "a" * 63, "::", str(ipaddress.ip_address(1))])
def test_a_host_that_is_one(tmp_path: Path, host: str) -> None:
    issue_all(tmp_path, [host])
    assert host in names_of(read(tmp_path, "client"))


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartError, match=rf"{place} cannot be written: \w+"):
            issue_all(place)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "ca.pem").write_text("no certificate"), "ca.pem is damaged: put it back, or remove"),
        (lambda d: (d / "ca-key.pem").write_text("no key"), "ca-key.pem is damaged: "),
        (lambda d: (d / "ca.pem").unlink(), "ca.pem is missing: "),
        (lambda d: (d / "ca-key.pem").unlink(), "ca-key.pem is missing: "),
        (lambda d: (d / "edge-key.pem").rename(d / "ca-key.pem"), "ca-key.pem is not an elliptic-curve key that"),
        (
            lambda d: [(d / f"edge{end}").rename(d / f"ca{end}") for end in (".pem", "-key.pem")],
            "ca.pem is not the certificate of a CA",
        ),
    ],
)
def test_an_unusable_ca_is_not_changed(directory: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(directory)
    present = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(StartError) as problem:
        issue_all(directory)
    assert sentence in str(problem.value)
    assert "\n" not in str(problem.value)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == present
