"""Reads and validates the files of a `Tls`, and reloads them when they have changed.

A file that is missing, damaged, incomplete or does not match the others is named in one sentence. At the start that is
an error; later the previous certificate stays in use. Knows nothing of gRPC.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tandem.errors import StartError
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)

T = TypeVar("T")
Signature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The validated contents of the files. The repr does not contain `key`."""

    cert: bytes
    key: bytes
    ca: bytes
    serial_number: int
    end_time: datetime
    """When the certificate expires."""

    def __repr__(self) -> str:
        return f"Material(serial {self.serial_number:x}, until {self.end_time:%Y-%m-%d %H:%M} UTC)"


def read_material(tls: Tls) -> Material:
    """Read and validate the three files.

    Raises:
        StartError: names the first invalid file.
    """
    # Imported here because it takes 70 ms, which processes without TLS avoid.
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificates

    cert, key, ca = (_read(file) for file in (tls.cert, tls.key, tls.ca))
    _parse(tls.ca, "certificate", lambda: load_pem_x509_certificates(ca))
    certificate = _parse(tls.cert, "certificate", lambda: load_pem_x509_certificates(cert))[0]
    private_key = _parse(tls.key, "private key without a password", lambda: load_pem_private_key(key, None))
    if private_key.public_key() != certificate.public_key():
        raise StartError(f"{tls.key} is not the private key of {tls.cert}")
    end_time = certificate.not_valid_after_utc
    if end_time <= datetime.now(UTC):
        raise StartError(f"{tls.cert} has expired on {end_time:%Y-%m-%d %H:%M} UTC")
    return Material(cert=cert, key=key, ca=ca, serial_number=certificate.serial_number, end_time=end_time)


class TlsFiles:
    """The current valid contents of the files of a `Tls`. The constructor does no I/O."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._signature: Signature = ()
        self._material: Material | None = None
        self._is_failure_logged = False

    def current(self) -> Material:
        """The contents to use now: the same object until the files have changed.

        Cheap enough for each call: checks only the files' times, sizes and inodes. Thread-safe.

        Raises:
            StartError: a file is invalid; at the first call only.
        """
        signature = tuple(_signature(file) for file in (self._tls.cert, self._tls.key, self._tls.ca))
        if self._material is None:
            self._material = read_material(self._tls)
            self._signature = signature
        elif signature != self._signature:
            # Taken before the files are read, so that a write in between is noticed at the next call.
            self._signature = signature
            self._material = self._renewed(self._material)
        return self._material

    def _renewed(self, previous: Material) -> Material:
        try:
            material = read_material(self._tls)
        except StartError as problem:
            # Logged once: between the two renames of a rotation, certificate and key do not match.
            if not self._is_failure_logged:
                log.warning("%s; the previous certificate (serial %x) stays in use", problem, previous.serial_number)
                self._is_failure_logged = True
            return previous
        self._is_failure_logged = False
        log.info("reloaded %s: %r", self._tls.cert, material)
        return material


def _signature(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as problem:
        raise StartError(f"{file} cannot be read: {problem.strerror}") from None


def _parse(file: Path, what: str, parse: Callable[[], T]) -> T:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return parse()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise StartError(f"{file} is damaged, or contains no {what} in PEM format") from None
