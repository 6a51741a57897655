"""A certificate authority for development: one CA in a directory, and a certificate signed by it for each role.

Keeps the CA and renews all other certificates, each file atomically, so that a rotation is one call. Owns the contents
of the certificates. Not for production: the CA's key is stored beside the certificates.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tandem.errors import ConfigError, StartError
from tandem.tls.paths import CA_NAME, certificate_file, key_file

NAMES = ("registry", "frontend", "prefill", "decode", "edge", "consul", "client")
DAYS_MAX = 825
CA_DAYS = 3650
CLOCK_SKEW = timedelta(minutes=5)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
CONSUL_DOMAIN = "tandem.service.consul"
CONSUL_SERVER = "server.dc1.consul"
"""Name that Consul servers require where they verify server names; only the certificate of Consul contains it."""
HOST_NAME = re.compile(r"(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate that was issued."""

    name: str
    serial_number: int
    end_time: datetime


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    is_new: bool


def issue_all(
    directory: Path, hosts: Sequence[str] = (), days: int = 90, now: datetime | None = None
) -> tuple[Issued, ...]:
    """Issue or renew the certificates of all roles; creates the directory and the CA if they are missing.

    Args:
        directory: directory of the files.
        hosts: names and addresses added to every certificate beside the default ones; empty: those in the previous
            certificate.
        days: validity of the certificates; never longer than the CA's.
        now: current time; for tests.

    Returns:
        All issued certificates; the CA's is first, and only if it was created now.

    Raises:
        ConfigError: days or a host is invalid; names the option.
        StartError: the directory cannot be written, or its CA cannot be used.
    """
    if not 1 <= days <= DAYS_MAX:
        raise ConfigError("days", f"must be 1 to {DAYS_MAX}, not {days}")
    extra = [_general_name(host) for host in hosts]
    now = now or datetime.now(UTC)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        authority = _open_authority(directory, now)
        issued = [_issue(directory, authority, name, extra, days, now) for name in NAMES]
    except OSError as problem:
        raise StartError(f"{problem.filename or directory} cannot be written: {problem.strerror}") from None
    if authority.is_new:
        issued.insert(0, _issued(CA_NAME, authority.certificate))
    return tuple(issued)


def _open_authority(directory: Path, now: datetime) -> _Authority:
    files = certificate_file(directory, CA_NAME), key_file(directory, CA_NAME)
    missing = [file for file in files if not file.exists()]
    if len(missing) == len(files):
        return _make_authority(directory, now)
    advice = f"put it back, or remove {files[0].name} and {files[1].name} to create a new CA"
    if missing:
        raise StartError(f"{missing[0]} is missing: {advice}")
    try:
        certificate = x509.load_pem_x509_certificate(files[0].read_bytes())
    except ValueError:
        raise StartError(f"{files[0]} is damaged: {advice}") from None
    try:
        key = load_pem_private_key(files[1].read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise StartError(f"{files[1]} is damaged: {advice}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise StartError(f"{files[1]} is not an elliptic-curve key that belongs to {files[0].name}: {advice}")
    if not _is_authority(certificate):
        raise StartError(f"{files[0]} is not the certificate of a CA: {advice}")
    if certificate.not_valid_after_utc <= now:
        raise StartError(f"{files[0]} has expired: remove it and {files[1].name} to create a new CA")
    return _Authority(certificate, key, is_new=False)


def _is_authority(certificate: x509.Certificate) -> bool:
    extensions = certificate.extensions
    try:
        extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _make_authority(directory: Path, now: datetime) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tandem development CA")])
    certificate = (
        _builder(name, name, key.public_key(), now, now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .sign(key, SHA256())
    )
    _write_pair(directory, CA_NAME, certificate, key)
    return _Authority(certificate, key, is_new=True)


def _issue(
    directory: Path, authority: _Authority, name: str, extra: list[x509.GeneralName], days: int, now: datetime
) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(host) for host in (*LOCAL_HOSTS, name, f"{name}.{CONSUL_DOMAIN}")]
    if name == "consul":
        names.append(_general_name(CONSUL_SERVER))
    names += extra or _previous_names(certificate_file(directory, name))
    issuer = authority.certificate
    issuer_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tandem-{name}")])
    end_time = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), now, end_time)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(dict.fromkeys(names)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
        .sign(authority.key, SHA256())
    )
    _write_pair(directory, name, certificate, key)
    return _issued(name, certificate)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end_time: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # The clocks of other machines may be behind.
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(end_time)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST_NAME.fullmatch(host) or len(host) > 253:
            raise ConfigError("host", f"{host!r} is neither a host name nor an IP address") from None
        return x509.DNSName(host)


def _previous_names(file: Path) -> list[x509.GeneralName]:
    """The subject alternative names of a certificate; empty if it is missing or unreadable."""
    try:
        extensions = x509.load_pem_x509_certificate(file.read_bytes()).extensions
        return list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
        return []


def _issued(name: str, certificate: x509.Certificate) -> Issued:
    return Issued(name=name, serial_number=certificate.serial_number, end_time=certificate.not_valid_after_utc)


def _write_pair(directory: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Write the key first: a reader between the two writes finds a mismatched pair and keeps the current one."""
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(key_file(directory, name), secret, 0o600)
    _write(certificate_file(directory, name), certificate.public_bytes(Encoding.PEM), 0o644)


def _write(file: Path, content: bytes, mode: int) -> None:
    """Write the file atomically; it never has wider permissions than `mode`."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
