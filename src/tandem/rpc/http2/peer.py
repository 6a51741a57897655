"""The peer of a connection: address and certificate, in gRPC's own form."""

from __future__ import annotations

import asyncio
import ssl


class Peer:
    """Of one connection. Nothing is looked up before it is asked for."""

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    @property
    def address(self) -> str:
        """As gRPC spells it."""
        name = self._transport.get_extra_info("peername")
        if not isinstance(name, tuple):
            return "unix:"
        host, port = name[:2]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    @property
    def speaks_http2(self) -> bool:
        """Without TLS that is seen from its first bytes; with TLS it has to say so."""
        tls = self._tls
        return tls is None or tls.selected_alpn_protocol() == "h2"

    def auth_context(self) -> dict[str, list[bytes]]:
        """Its certificate; nothing without TLS."""
        tls = self._tls
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        if certificate is None:
            return {}
        return {"x509_pem_cert": [ssl.DER_cert_to_PEM_cert(certificate).encode()], "transport_security_type": [b"ssl"]}

    @property
    def _tls(self) -> ssl.SSLObject | None:
        found: ssl.SSLObject | None = self._transport.get_extra_info("ssl_object")
        return found
