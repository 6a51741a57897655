"""Paths of a process's certificate, its private key, and its trusted CAs.

A value that is passed from the settings to every server and channel; there is no global one. Reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CA_NAME = "ca"
CLIENT_NAME = "client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Paths of three PEM files."""

    cert: Path
    """The certificate of this process, followed by intermediate certificates, if any."""
    key: Path
    """Its private key, without a password."""
    ca: Path
    """The CAs that sign the certificates of trusted peers."""

    @classmethod
    def in_directory(cls, directory: Path, name: str) -> Tls:
        """The files of one role as `tandem certs` names them."""
        return cls(
            cert=certificate_file(directory, name),
            key=key_file(directory, name),
            ca=certificate_file(directory, CA_NAME),
        )


def client_tls(directory: Path | str | None) -> Tls | None:
    """The client's files for a cluster with that certificate directory; None: the cluster uses plaintext."""
    return None if directory is None else Tls.in_directory(Path(directory), CLIENT_NAME)


def certificate_file(directory: Path, name: str) -> Path:
    """Path of the certificate of that name in a directory of `tandem certs`."""
    return directory / f"{name}.pem"


def key_file(directory: Path, name: str) -> Path:
    """Path of the private key of that name in a directory of `tandem certs`."""
    return directory / f"{name}-key.pem"
