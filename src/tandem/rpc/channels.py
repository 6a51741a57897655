"""Client side of gRPC: one channel policy for every call between Tandem's processes, and a pool by address.

A channel is made once for an address and kept; long-lived streams and new calls share it.
"""

from __future__ import annotations

import grpc

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
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port with Tandem's policy."""
    return grpc.aio.insecure_channel(address, options=OPTIONS)


class Channels:
    """Channels by address, opened on first use and closed together."""

    def __init__(self) -> None:
        self._by_address: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to an address."""
        channel = self._by_address.get(address)
        if channel is None:
            channel = self._by_address[address] = open_channel(address)
        return channel

    async def forget(self, address: str) -> None:
        """Close the channel to an address nobody will call again."""
        channel = self._by_address.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Close all channels. May be called twice."""
        channels, self._by_address = self._by_address, {}
        for channel in channels.values():
            await channel.close()
