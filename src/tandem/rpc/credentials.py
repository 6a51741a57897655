"""TLS credentials of servers and channels: from `Tls` to gRPC's credentials, or to Python's ssl contexts.

All reload changed files. A server does at every handshake. A gRPC channel keeps its credentials for ever, so new ones
are created when the files have changed, and `tandem.rpc.channels` opens new channels with them.
"""

from __future__ import annotations

import logging
import ssl

import grpc

from tandem.errors import StartError
from tandem.tls.material import Material, TlsFiles
from tandem.tls.paths import Tls

log = logging.getLogger(__name__)


class ServerCredentials:
    """Requires a certificate of every peer, and presents the one that is in the files at that moment.

    gRPC's core calls back into this object: it must live as long as the server.
    """

    def __init__(self, tls: Tls) -> None:
        """Reads the files.

        Raises:
            StartError: names the unusable file.
        """
        self._files = TlsFiles(tls)
        self._in_use = self._files.current()
        self.material = self._in_use
        """The files' content at the start."""
        self.grpc = grpc.dynamic_ssl_server_credentials(
            _configuration(self._in_use),
            self._fetch,  # type: ignore[arg-type]  # the stubs do not know that it may return None
            require_client_authentication=True,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake, from its own threads; None: unchanged. Never raises."""
        material = self._files.current()
        if material is self._in_use:
            return None
        self._in_use = material
        return _configuration(material)


class ServerContexts:
    """The same for `tandem.rpc.http2`: an ssl context for each new connection."""

    def __init__(self, tls: Tls) -> None:
        """Reads the files.

        Raises:
            StartError: names the unusable file.
        """
        self._tls = tls
        self._files = TlsFiles(tls)
        self.material = self._of = self._files.current()
        """The files' content at the start."""
        self._context = _server_context(tls, self.material)

    def current(self) -> ssl.SSLContext:
        """The context for a new connection: the same object until the files have changed. Never raises."""
        material = self._files.current()
        if material is not self._of:
            try:
                self._context = _server_context(self._tls, material)
                self._of = material
            except StartError as problem:
                # The files changed again after they were checked; the next connection tries again.
                log.info("%s; the previous certificate stays in use", problem)
        return self._context


class ChannelCredentials:
    """The credentials of all channels of one owner. Creating it does no I/O."""

    def __init__(self, tls: Tls) -> None:
        self._files = TlsFiles(tls)
        self._of: Material | None = None
        self._grpc: grpc.ChannelCredentials | None = None

    def current(self) -> grpc.ChannelCredentials:
        """Credentials for a new channel: the same object until the files have changed.

        Raises:
            StartError: the files are unusable, and have been since the start.
        """
        material = self._files.current()
        if self._grpc is None or material is not self._of:
            self._of = material
            self._grpc = grpc.ssl_channel_credentials(material.ca, material.key, material.cert)
        return self._grpc


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)


def _server_context(tls: Tls, material: Material) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    # As gRPC does: any certificate in the CA file is trusted, also an intermediate one.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_TRUSTED_FIRST
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=material.ca.decode())
        context.load_cert_chain(tls.cert, tls.key)
    except (ssl.SSLError, OSError, ValueError):
        raise StartError(f"{tls.cert}, {tls.key} and {tls.ca} do not fit together: use those of one CA") from None
    return context
