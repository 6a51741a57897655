"""Where a process finds what it proves itself with, and whom it trusts.

A value that is passed from the settings to every server and channel; there is no global one. Reads nothing.
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
    """The certificate of this process, then those between it and the CA, if any."""
    key: Path
    """Its private key, without a password."""
    ca: Path
    """The CAs whose certificates are accepted from peers."""

    @classmethod
    def in_directory(cls, directory: Path, name: str) -> Tls:
        """The files of one role as `tandem certs` names them."""
        return cls(
            cert=certificate_file(directory, name),
            key=key_file(directory, name),
            ca=certificate_file(directory, CA_NAME),
        )


def client_tls(directory: Path | str | None) -> Tls | None:
    """What a client presents to a cluster that runs with that directory; None: the cluster speaks plaintext."""
    return None if directory is None else Tls.in_directory(Path(directory), CLIENT_NAME)


def certificate_file(directory: Path, name: str) -> Path:
    """The certificate of that name in a directory that `tandem certs` made."""
    return directory / f"{name}.pem"


def key_file(directory: Path, name: str) -> Path:
    """The private key of that name in a directory that `tandem certs` made."""
    return directory / f"{name}-key.pem"
