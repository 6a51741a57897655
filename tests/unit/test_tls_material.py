"""TLS files of a process: errors for damaged ones, and the reload of changed ones."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tandem.errors import StartError
from tandem.tls.authority import issue_all
from tandem.tls.material import TlsFiles, read_material
from tandem.tls.paths import Tls, client_tls


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    issue_all(tmp_path / "certs")
    return tmp_path / "certs"


@pytest.fixture
def tls(directory: Path) -> Tls:
    return Tls.in_directory(directory, "decode")


def encrypt(file: Path) -> None:
    key = load_pem_private_key(file.read_bytes(), None)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))


def test_whole_files_are_read(tls: Tls) -> None:
    material = read_material(tls)
    assert (material.cert, material.key, material.ca) == (
        tls.cert.read_bytes(),
        tls.key.read_bytes(),
        tls.ca.read_bytes(),
    )
    assert "PRIVATE" not in repr(material)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda tls: tls.cert.unlink(), "decode.pem cannot be read: No such file or directory"),
        (lambda tls: tls.ca.unlink(), "ca.pem cannot be read: No such file or directory"),
        (lambda tls: (tls.key.unlink(), tls.key.mkdir()), "decode-key.pem cannot be read: Is a directory"),
        (lambda tls: tls.cert.write_text("hello"), "decode.pem is damaged, or contains no certificate in PEM format"),
        (lambda tls: tls.ca.write_bytes(b""), "ca.pem is damaged, or contains no certificate in PEM format"),
        (
            lambda tls: tls.cert.write_bytes(tls.cert.read_bytes()[:300]),
            "decode.pem is damaged, or contains no certificate in PEM format",
        ),
        (
            lambda tls: tls.key.write_bytes(tls.key.read_bytes()[:99]),
            "decode-key.pem is damaged, or contains no private key without",
        ),
        (
            lambda tls: encrypt(tls.key),
            "decode-key.pem is damaged, or contains no private key without a password in PEM format",
        ),
        (
            lambda tls: shutil.copy(tls.key.with_name("edge-key.pem"), tls.key),
            "decode-key.pem is not the private key of ",
        ),
    ],
)
def test_a_damaged_file_is_named(tls: Tls, damage: Callable[[Tls], object], sentence: str) -> None:
    damage(tls)
    with pytest.raises(StartError) as problem:
        read_material(tls)
    assert sentence in str(problem.value)
    assert "\n" not in str(problem.value)


def test_an_expired_certificate_is_named(directory: Path, tls: Tls) -> None:
    issue_all(directory, days=1, now=datetime.now(UTC) - timedelta(days=2))
    with pytest.raises(StartError, match=r"decode\.pem has expired on \d{4}-"):
        read_material(tls)


def test_tls_files_are_not_read_before_they_are_needed(tmp_path: Path) -> None:
    tls = client_tls(tmp_path / "later")
    assert tls is not None
    files = TlsFiles(tls)
    with pytest.raises(StartError, match=r"client\.pem cannot be read"):
        files.current()
    issue_all(tmp_path / "later")
    assert files.current() == read_material(tls)


def test_the_same_until_the_files_change(directory: Path, tls: Tls) -> None:
    files = TlsFiles(tls)
    first = files.current()
    assert files.current() is first
    issue_all(directory)
    second = files.current()
    assert second.serial_number != first.serial_number
    assert second == read_material(tls)
    assert files.current() is second


def test_unchanged_files_are_not_read_again(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TlsFiles(tls)
    first = files.current()
    monkeypatch.setattr(Path, "read_bytes", lambda file: pytest.fail(f"{file} was read"))
    assert files.current() is first


def test_a_step_of_a_rotation_keeps_the_former_and_says_so_once(
    directory: Path, tls: Tls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = TlsFiles(tls)
    former = files.current()
    shutil.copytree(directory, tmp_path / "next")
    issue_all(tmp_path / "next")
    coming = Tls.in_directory(tmp_path / "next", "decode")
    with caplog.at_level(logging.INFO):
        # A key without its certificate, then half of the certificate, then both.
        os.replace(coming.key, tls.key)
        assert files.current() is former
        whole = coming.cert.read_bytes()
        tls.cert.write_bytes(whole[:200])
        assert files.current() is former
        assert files.current() is former
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"(serial {former.serial_number:x}) stays in use" in caplog.text
        tls.cert.write_bytes(whole)
        assert files.current() == read_material(tls)
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        tls.ca.unlink()
        assert files.current().cert == whole
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
