"""gRPC channels: the options of every channel between Tandem's processes, and a pool by address.

A channel is opened once per address and kept; long-lived streams and new calls share it. With TLS, channels are
replaced after a certificate renewal; calls on the old ones run to their end.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Collection

import grpc

from tandem.rpc.credentials import ChannelCredentials
from tandem.tls.paths import Tls

MESSAGE_BYTES_MAX = 64 * 2**20

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A peer that vanished without closing its connection is noticed within 10 s + 5 s even on a silent stream.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted worker is reached again within a second instead of gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    # Otherwise channels to one address share a connection, and a new channel inherits an old one's back-off.
    ("grpc.use_local_subchannel_pool", 1),
)

# gRPC uses min_reconnect_backoff_ms as the timeout of one connect, handshake included.
CONNECT_MS = 1_000
CONNECT_TLS_MS = 2_000
"""A handshake on a busy machine sometimes takes more than 100 ms, and a shorter timeout would fail the call. A peer
that refuses does so at once, and `tandem_frontend.routing.worker_health` notices silent workers."""

RETIRE_GRACE_S = 3_600.0
"""A worker can be gone from the registry and still be streaming."""


def open_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """A channel to host:port with Tandem's options; without `tls` in plaintext.

    Raises:
        StartError: a file of `tls` is unusable.
    """
    return _open(address, None if tls is None else ChannelCredentials(tls).current())


def _open(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=(*OPTIONS, ("grpc.min_reconnect_backoff_ms", CONNECT_MS)))
    options = (*OPTIONS, ("grpc.min_reconnect_backoff_ms", CONNECT_TLS_MS))
    return grpc.aio.secure_channel(address, credentials, options=options)


class Channels:
    """Channels by address, opened on first use and closed together."""

    def __init__(self, tls: Tls | None = None) -> None:
        """Does no I/O yet. Without `tls` the channels are plaintext."""
        self._credentials = None if tls is None else ChannelCredentials(tls)
        self._opened_with: grpc.ChannelCredentials | None = None
        self._by_address: dict[str, grpc.aio.Channel] = {}
        self._retiring: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to an address. Not to be kept: a certificate renewal replaces all channels.

        Raises:
            StartError: the files of `tls` are unusable, and have been since the start.
        """
        credentials = None if self._credentials is None else self._credentials.current()
        if credentials is not self._opened_with:
            self.keep_only(())
            self._opened_with = credentials
        channel = self._by_address.get(address)
        if channel is None:
            channel = self._by_address[address] = _open(address, credentials)
        return channel

    def keep_only(self, addresses: Collection[str]) -> None:
        """Close the channels to all other addresses, each as soon as the calls on it have ended."""
        for address in [known for known in self._by_address if known not in addresses]:
            channel = self._by_address.pop(address)
            # In a context of its own: it outlives the request in whose task the change was noticed.
            closing = asyncio.create_task(channel.close(RETIRE_GRACE_S), context=contextvars.Context())
            self._retiring[closing] = channel
            closing.add_done_callback(lambda task: self._retiring.pop(task, None))

    async def close(self) -> None:
        """Close all channels. May be called twice."""
        channels, self._by_address = [*self._by_address.values(), *self._retiring.values()], {}
        tasks, self._retiring = list(self._retiring), {}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for channel in channels:
            await channel.close()
