"""One connection: carries h2's events to its streams, holds the peer to its budgets, and ends.

Owns the transport. What is wrong with one stream ends that stream; what h2 calls wrong with the connection, or a peer
that costs more than its budgets, ends this connection and no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

import grpc
from h2 import events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from tandem.rpc.http2 import limits
from tandem.rpc.http2.conduct import REQUEST_WORTH, Conduct
from tandem.rpc.http2.framing import Http2State, goaway_frame
from tandem.rpc.http2.keepalive import Keepalive
from tandem.rpc.http2.metadata import Malformed
from tandem.rpc.http2.peer import Peer
from tandem.rpc.http2.sender import Sender
from tandem.rpc.http2.streams import Shared, Streams

log = logging.getLogger(__name__)

PING = b"tandem??"
COSTS_TOO_MUCH = "it sends too much that means nothing"
LEAVE_PING = b"tandem.."
"""Its answer says that the peer has read the GOAWAY before it."""
NO_STREAM_YET = 2**31 - 1
"""The last stream of a GOAWAY that refuses none."""


class Server(Shared, Protocol):
    """The server that accepted the connection."""

    is_stopping: bool

    def joined(self, connection: Connection) -> None:
        """A connection can be used."""

    def left(self, connection: Connection) -> None:
        """A connection is gone."""


class Connection(asyncio.Protocol):
    """One client's, as the loop knows it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._state = Http2State(server.streams_max)
        self._is_greeted = self._is_leaving = self._is_closed = False
        self._is_resting = False
        """Frames that have come wait for the next turn of the loop; nothing more is read until then."""
        self._conduct = Conduct(server.streams_max)
        self._leaving_code = ErrorCodes.NO_ERROR
        self._leaving: asyncio.TimerHandle | None = None
        """Until then a peer that received the first GOAWAY may open streams that were under way."""
        self._closing: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop
        self._transport: asyncio.Transport
        self._peer: Peer
        self._sender: Sender
        self._streams: Streams
        self._keepalive: Keepalive

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can be used; the server speaks first."""
        self._loop = asyncio.get_running_loop()
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=limits.SOCKET_BUFFER_BYTES)
        self._peer = Peer(self._transport)
        self._sender = Sender(self._state, self._transport, self._server.unsent, self.give_up)
        self._streams = Streams(self._server, self._state, self._sender, self._peer, self._conduct, self._close_if_done)
        self._keepalive = Keepalive(self._ping, self._lose, self._streams.look)
        self._server.joined(self)
        if not self._peer.speaks_http2:
            self.give_up("it does not speak HTTP/2")
            return
        self._state.begin()
        self._sender.take_from_state()
        if self._server.is_stopping:
            self.leave()

    def data_received(self, data: bytes) -> None:
        """Bytes of the peer."""
        self._conduct.bytes += len(data)
        self._work(data)

    def pause_writing(self) -> None:
        """The socket is full."""
        self._sender.pause()

    def resume_writing(self) -> None:
        """It is not any more."""
        self._sender.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone; its calls are cancelled."""
        if self._closing is not None:
            self._closing.cancel()
        self._end()
        self._server.left(self)

    # What the server calls.

    @property
    def call_count(self) -> int:
        """Calls that are open on it."""
        return self._streams.count

    @property
    def is_leaving(self) -> bool:
        """Whether its client has received a GOAWAY."""
        return self._is_leaving or self._leaving is not None

    @property
    def was_used(self) -> bool:
        """Whether it has ever carried a call."""
        return self._state.highest_inbound_stream_id > 0

    @property
    def heard_s(self) -> float:
        """When the peer last sent anything, in the loop's time."""
        return self._keepalive.heard_s

    def leave(self, error_code: ErrorCodes = ErrorCodes.NO_ERROR, *, at_once: bool = False) -> None:
        """Take no more calls; close when those that are open have ended.

        A client learns it a while later. What it has sent until then is served: of calls that one GOAWAY refuses,
        gRPC's own client loses some. With `at_once`, they are refused all the same.
        """
        if self._is_leaving or self._is_closed:
            return
        if at_once or not self._is_greeted:
            self._leave_at_last(error_code)
        elif self._leaving is None:
            self._sender.write(goaway_frame(NO_STREAM_YET, error_code))
            self._state.ping(LEAVE_PING)
            self._sender.take_from_state()
            self._leave_later(limits.GOAWAY_WAIT_S, error_code)

    def _leave_later(self, wait_s: float, error_code: ErrorCodes) -> None:
        self._leaving_code = error_code
        self._leaving = self._loop.call_later(wait_s, self._leave_at_last, error_code)

    def _leave_at_last(self, error_code: ErrorCodes) -> None:
        if self._is_leaving or self._is_closed:
            return
        self._is_leaving = True
        self._stop_waiting()
        self._sender.write(goaway_frame(self._state.highest_inbound_stream_id, error_code))
        self._close_if_done()

    def _stop_waiting(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def cut(self, code: grpc.StatusCode, details: str) -> None:
        """End all calls with this status, and then the connection."""
        self.leave(at_once=True)
        self._streams.cut_all(code, details)

    def give_up(self, why: str, error_code: ErrorCodes | None = ErrorCodes.ENHANCE_YOUR_CALM) -> None:
        """Close it at once; calls that run are cancelled. GOAWAY is sent as far as the socket takes it."""
        if self._is_closed:
            return
        # Without a handshake this is no client of ours: a port scanner, a browser.
        log.log(
            logging.INFO if self._is_greeted else logging.DEBUG,
            "closed a connection from %s: %s",
            self._peer.address,
            why,
        )
        if error_code is not None and self._is_greeted and not self._is_leaving:
            self._sender.write(goaway_frame(self._state.highest_inbound_stream_id, error_code, why.encode()))
        self._close()

    def _lose(self, why: str) -> None:
        """The peer does not answer; a GOAWAY would not reach it."""
        self.give_up(why, None)

    def abort(self) -> None:
        """Close it without another word."""
        self._end()
        self._transport.abort()

    # What the peer does.

    def _work(self, data: bytes) -> None:
        """Take what has come to h2, as much as one turn of the loop is for, and do what it says."""
        self._keepalive.heard_s = self._loop.time()
        frames = self._state.incoming_buffer
        try:
            frames.begin_turn()
            self._receive(data)
        except ProtocolError as problem:
            # h2 has written its GOAWAY, unless this was no HTTP/2 from its first byte.
            self._sender.take_from_state()
            self.give_up(f"it broke the protocol ({type(problem).__name__})", None)
        except Exception:  # a defect in one connection must not end the others
            log.exception(
                "bug in this server: closing the connection from %s, whose calls end; others are not affected",
                self._peer.address,
            )
            self.give_up("a defect of this server", ErrorCodes.INTERNAL_ERROR)
        if frames.has_more and not self._is_resting and not self._is_closed:
            self._is_resting = True
            self._transport.pause_reading()
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """The next turn of the loop has come."""
        self._is_resting = False
        self._work(b"")
        if not self._is_resting and not self._transport.is_closing():
            self._transport.resume_reading()

    def _receive(self, data: bytes) -> None:
        if self._is_closed:
            return
        found = self._state.receive_data(data)
        self._sender.take_from_state()
        for event in found:
            handle = _HANDLERS.get(type(event))
            if handle is not None:
                handle(self, event)
                if self._is_closed:
                    return
        frame_count = self._state.incoming_buffer.frame_count
        if not self._conduct.frames(self._loop.time(), frame_count, self._sender.frame_count):
            self.give_up(COSTS_TOO_MUCH)
        elif self._state.is_overfull:
            self.give_up("its frame or its headers do not end")

    def _on_request(self, event: events.RequestReceived) -> None:
        stream_id = _known(event.stream_id)
        self._conduct.worth += REQUEST_WORTH
        if self._is_leaving:
            self._refuse_late(stream_id)
        elif self._streams.count >= self._server.streams_max:
            self._streams.reset(stream_id, ErrorCodes.REFUSED_STREAM)
            self._spend_reset()
        else:
            try:
                cost = self._streams.begin(stream_id, event.headers or [], ends=event.stream_ended is not None)
            except Malformed:
                self._streams.reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
                cost = 1
            if cost:
                self._spend_reset(cost)

    def _refuse_late(self, stream_id: int) -> None:
        """A client that has heard GOAWAY opens no more. What it has opened before is as if it had never been."""
        self._streams.reset(stream_id, ErrorCodes.REFUSED_STREAM)
        if not self._conduct.late_stream(self._loop.time()):
            self.give_up("it opens streams on and on")

    def _on_data(self, event: events.DataReceived) -> None:
        data, ends = event.data or b"", event.stream_ended is not None
        size = event.flow_controlled_length or 0
        if self._streams.receive(_known(event.stream_id), data, size, ends=ends) and (data or ends):
            self._conduct.worth += 1

    def _on_trailers(self, event: events.TrailersReceived) -> None:
        self._conduct.worth += 1
        self._streams.receive(_known(event.stream_id), b"", 0, ends=True)

    def _on_reset(self, event: events.StreamReset) -> None:
        self._conduct.worth += 1
        self._streams.leave(_known(event.stream_id))
        self._spend_reset()

    def _on_window(self, event: events.WindowUpdated) -> None:
        if event.stream_id:
            self._streams.wake(event.stream_id)
        else:
            self._sender.pump()

    def _on_settings(self, event: events.RemoteSettingsChanged) -> None:
        if not self._conduct.settings(self._loop.time()):
            self.give_up(COSTS_TOO_MUCH)
            return
        if not self._is_greeted:
            self._is_greeted = True
            self._keepalive.begin()
        if len(self._state.remote_settings) > limits.PEER_SETTINGS_MAX:
            self.give_up("it has too many settings")
            return
        self._sender.follow_settings()
        if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings:
            self._streams.wake(None)

    def _on_ping(self, event: events.PingReceived) -> None:
        if not self._conduct.ping(self._loop.time()):
            self.give_up(COSTS_TOO_MUCH)

    def _on_ping_answer(self, event: events.PingAckReceived) -> None:
        if event.ping_data == LEAVE_PING and self._leaving is not None:
            # gRPC's own client answers before it writes the headers of streams that it has begun.
            self._leaving.cancel()
            self._leave_later(limits.GOAWAY_SETTLE_S, self._leaving_code)

    def _on_goaway(self, event: events.ConnectionTerminated) -> None:
        """The client opens no more streams."""
        self._is_leaving = True
        self._close_if_done()

    def _spend_reset(self, count: int = 1) -> None:
        """Count a stream that was opened for nothing. Calls that run may end: an edge carries those of many clients."""
        if not self.is_leaving and not self._conduct.reset(self._loop.time(), count):
            log.info(
                "connection from %s gets no new calls: too many were cancelled or refused at once",
                self._peer.address,
            )
            self.leave(ErrorCodes.ENHANCE_YOUR_CALM)

    # How it ends.

    def _ping(self) -> None:
        self._state.ping(PING)
        self._sender.take_from_state()

    def _close_if_done(self) -> None:
        if self._is_leaving and not self._streams.count and not self._is_closed:
            self._close(waits=True)

    def _close(self, *, waits: bool = False) -> None:
        """What was written may leave, but not for ever.

        With `waits` the peer is to close first: a socket that is closed with something unread in it throws away what
        the peer has not read either, which may be the last response. TLS says goodbye by itself.
        """
        self._sender.flush()
        self._end()
        if self._closing is None:
            self._closing = self._loop.call_later(limits.CLOSE_TIMEOUT_S, self._transport.abort)
        if not waits or not self._transport.can_write_eof() or self._transport.is_closing():
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:
            # The peer has closed it already.
            self._transport.close()

    def _end(self) -> None:
        self._is_closed = True
        self._stop_waiting()
        self._keepalive.close()
        self._sender.close()
        self._streams.leave_all()


def _known(stream_id: int | None) -> int:
    assert stream_id is not None, "h2 names the stream of such an event"
    return stream_id


_HANDLERS: dict[type[events.Event], Callable[[Connection, Any], None]] = {
    events.RequestReceived: Connection._on_request,
    events.DataReceived: Connection._on_data,
    events.TrailersReceived: Connection._on_trailers,
    events.StreamReset: Connection._on_reset,
    events.WindowUpdated: Connection._on_window,
    events.RemoteSettingsChanged: Connection._on_settings,
    events.PingReceived: Connection._on_ping,
    events.ConnectionTerminated: Connection._on_goaway,
    events.PingAckReceived: Connection._on_ping_answer,
}
"""What ends a stream comes with the event that carries its last bytes, and is read there."""
