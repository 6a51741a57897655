"""What leaves on one connection: frames of one turn of the loop in one write, and what has to wait for the peer.

Owns the order of frames, each stream's unsent bytes, and the bound on what a peer that does not read can make it keep.
What may leave is decided by h2's windows and by the socket.

A message takes one concatenation and one append here; no task, future or timer. One that does not fit is kept with its
stream; its handler looks at `writable` before it sends more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from h2.stream import H2Stream

from tandem.rpc.http2 import limits
from tandem.rpc.http2.framing import DATA, FRAME, FRAME_AND_PREFIX, PREFIX, Http2State
from tandem.rpc.http2.pace import MessageMemory, Pace

PREFIX_BYTES = PREFIX.size


class Sender:
    """The way out of one connection."""

    def __init__(
        self, state: Http2State, transport: asyncio.Transport, memory: MessageMemory, on_overrun: Callable[[str], None]
    ) -> None:
        """`on_overrun` is called with the reason when a peer leaves too much unread that no window holds back.

        `memory` is what all connections share for messages that their peers do not read.
        """
        self.state = state
        self.memory = memory
        self.on_evicted: Callable[[int], None] = lambda stream_id: None
        """Called with the stream whose messages have to be given up for others."""
        self.frame_bytes_max = 0
        self.frame_count = 0
        """Frames of messages that were sent so far."""
        self.is_paused = False
        """The socket takes no more at the moment."""
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._on_overrun = on_overrun
        self._frames: list[bytes] = []
        self._bytes = 0
        self._is_scheduled = False
        self.is_closed = False
        self._control_bytes = 0
        """Written while the socket took nothing."""
        self._ready: dict[Outgoing, None] = {}
        """Streams with unsent bytes that their own window allows, in turn."""
        self._freed: list[Outgoing] = []
        """Streams that have become writable and are to be notified."""
        self.follow_settings()

    def follow_settings(self) -> None:
        """The peer has said how long a frame may be."""
        self.frame_bytes_max = min(self.state.max_outbound_frame_size, limits.FRAME_BYTES_MAX)

    def write(self, frame: bytes) -> None:
        """A frame that flow control has let through. It leaves at the end of this turn of the loop."""
        self._frames.append(frame)
        self._bytes += len(frame)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush_turn)
        elif self._bytes > limits.TURN_BYTES_MAX:
            self.flush()

    def control(self, frames: bytes) -> None:
        """Frames that no window holds back."""
        if not frames:
            return
        if self.is_paused:
            self._control_bytes += len(frames)
            if self._control_bytes > limits.CONTROL_BYTES_MAX:
                self._on_overrun("it does not read what it has asked for")
                return
        # `flush` counts it as one.
        self.frame_count -= 1
        self.write(frames)

    def take_from_state(self) -> None:
        """Send what h2 itself has to say."""
        self.control(self.state.data_to_send())

    def _flush_turn(self) -> None:
        self._is_scheduled = False
        self.flush()

    def flush(self) -> None:
        """Hand everything to the socket now."""
        frames = self._frames
        if not frames:
            return
        self._frames = []
        self._bytes = 0
        self.frame_count += len(frames)
        # A transport that is lost says so a turn later; until then uvloop's takes a write for a mistake.
        if not self.is_closed and not self._transport.is_closing():
            self._transport.write(frames[0] if len(frames) == 1 else b"".join(frames))

    def close(self) -> None:
        """The connection is gone."""
        self.is_closed = True
        self._frames.clear()
        self._ready.clear()

    def now_s(self) -> float:
        """The loop's time."""
        return self._loop.time()

    def pause(self) -> None:
        """The socket is full."""
        self.is_paused = True

    def resume(self) -> None:
        """The socket takes more."""
        self.is_paused = False
        self._control_bytes = 0
        self.pump()

    def make_ready(self, stream: Outgoing) -> None:
        """It has unsent bytes, and its own window allows some. Call `pump` afterwards."""
        self._ready[stream] = None

    def discard(self, stream: Outgoing) -> None:
        """It sends nothing any more."""
        self._ready.pop(stream, None)

    def pump(self) -> None:
        """Send what waits, a frame of each stream in turn, as far as the connection's window and the socket let it."""
        ready, state = self._ready, self.state
        while ready and not self.is_paused and state.outbound_flow_control_window > 0 and not self.is_closed:
            stream = next(iter(ready))
            del ready[stream]
            if stream.send_frame():
                ready[stream] = None
        if self._freed:
            freed, self._freed = self._freed, []
            for stream in freed:
                stream.notify_writable()

    def mark_writable(self, stream: Outgoing) -> None:
        """Notify it once everything that can leave has left."""
        self._freed.append(stream)


class Outgoing:
    """The messages of one stream that are on their way to the peer."""

    __slots__ = (
        "_is_counted",
        "_is_full",
        "_messages",
        "_moved_bytes",
        "_offset",
        "_on_sent",
        "_pace",
        "_sender",
        "_stream",
        "account",
        "on_writable",
        "unsent_bytes",
    )

    def __init__(self, sender: Sender, stream: H2Stream) -> None:
        self._sender = sender
        self._stream = stream
        self._messages: deque[bytes] | None = None
        self._offset = 0
        """Of the first message, so much has left."""
        self._is_counted = self._is_full = False
        self._moved_bytes = 0
        """That the peer has read since it last made progress."""
        self._on_sent: Callable[[], None] | None = None
        self._pace: Pace | None = None
        """Of what is left once there are no more messages."""
        self.unsent_bytes = 0
        self.account = ""
        """For whom it counts while much of it is unread; set before `finish`."""
        self.on_writable: Callable[[], None] | None = None
        """Called each time it becomes writable again."""

    @property
    def writable(self) -> bool:
        """False while more than `limits.STREAM_UNSENT_BYTES_MAX` wait for the peer."""
        return self.unsent_bytes <= limits.STREAM_UNSENT_BYTES_MAX

    def send(self, message: bytes) -> None:
        """Send a message now, or as soon as the peer lets it through, behind those before it."""
        sender, stream = self._sender, self._stream
        state, size = sender.state, len(message) + PREFIX_BYTES
        if (
            size <= stream.outbound_flow_control_window
            and size <= state.outbound_flow_control_window
            and size <= sender.frame_bytes_max
            and not self.unsent_bytes
            and not sender.is_paused
        ):
            stream.outbound_flow_control_window -= size
            state.outbound_flow_control_window -= size
            head = FRAME_AND_PREFIX.pack(size >> 8, size & 0xFF, DATA, 0, stream.stream_id, 0, size - PREFIX_BYTES)
            sender.write(head + message)
        else:
            self._keep(PREFIX.pack(0, size - PREFIX_BYTES) + message)

    def finish(self, on_sent: Callable[[], None]) -> None:
        """There will be no more messages. Called once all of them have left."""
        if self.unsent_bytes:
            self._on_sent = on_sent
            self._pace = Pace(self._sender.now_s())
            self._is_counted = not self.writable
            if self._is_counted:
                self._sender.memory.count_unread(self.account, 1)
        else:
            on_sent()

    def is_slow(self, now_s: float) -> bool:
        """Whether the peer reads the last of it too slowly."""
        return self._pace is not None and self.unsent_bytes > 0 and self._pace.is_slow(now_s)

    def evict(self) -> None:
        """Its messages are given up for those of others."""
        self._sender.on_evicted(self._stream.stream_id)

    def cut(self) -> bool:
        """Drop the messages of which nothing has left. Returns whether that is all of them."""
        if self._offset:
            return False
        self._messages = None
        self._drop()
        return True

    def discard(self) -> None:
        """Nothing of it is sent any more."""
        self._messages = self.on_writable = None
        self._drop()
        self._take_on_sent()

    def _drop(self) -> None:
        if self.unsent_bytes:
            self.unsent_bytes = 0
            self._sender.memory.keep(self, 0)
        self._sender.discard(self)

    def wake(self) -> None:
        """The stream's own window has grown. Call the sender's `pump` afterwards."""
        if self.unsent_bytes and self._stream.outbound_flow_control_window > 0:
            self._sender.make_ready(self)

    def _keep(self, message: bytes) -> None:
        if self._messages is None:
            self._messages = deque()
        self._messages.append(message)
        self.unsent_bytes += len(message)
        memory = self._sender.memory
        memory.keep(self, self.unsent_bytes)
        self.wake()
        self._sender.pump()
        self._is_full = not self.writable
        if memory.bytes > memory.bytes_max:
            memory.evict()

    def send_frame(self) -> bool:
        """Send one frame. Returns whether there is more that the stream's own window allows."""
        sender, stream = self._sender, self._stream
        window = min(stream.outbound_flow_control_window, sender.state.outbound_flow_control_window)
        if window <= 0:
            # The peer has made its windows smaller since; a WINDOW_UPDATE wakes this stream again.
            return False
        data = self._take(min(window, sender.frame_bytes_max))
        size = len(data)
        stream.outbound_flow_control_window -= size
        sender.state.outbound_flow_control_window -= size
        sender.write(FRAME.pack(size >> 8, size & 0xFF, DATA, 0, stream.stream_id) + data)
        self._note_progress(size)
        if self._is_full and self.writable:
            self._is_full = False
            sender.mark_writable(self)
        if self.unsent_bytes:
            return stream.outbound_flow_control_window > 0
        self._messages = None
        on_sent = self._take_on_sent()
        if on_sent is not None:
            on_sent()
        return False

    def _take_on_sent(self) -> Callable[[], None] | None:
        """Nothing waits for it any more."""
        on_sent, self._on_sent = self._on_sent, None
        if self._is_counted:
            self._is_counted = False
            self._sender.memory.count_unread(self.account, -1)
        return on_sent

    def _note_progress(self, size: int) -> None:
        memory = self._sender.memory
        memory.keep(self, self.unsent_bytes)
        self._moved_bytes += size
        if self._moved_bytes >= limits.PROGRESS_BYTES:
            self._moved_bytes = 0
            memory.advance(self)
        if self._pace is not None:
            self._pace.count(size, self._sender.now_s())

    def _take(self, size: int) -> bytes:
        """The next bytes, of several messages where one is shorter."""
        assert self._messages is not None, "a stream without messages is not ready"
        pieces = []
        while size > 0 and self._messages:
            first = self._messages[0]
            piece = first[self._offset : self._offset + size]
            pieces.append(piece)
            size -= len(piece)
            self.unsent_bytes -= len(piece)
            self._offset += len(piece)
            if self._offset == len(first):
                self._messages.popleft()
                self._offset = 0
        return b"".join(pieces)

    def notify_writable(self) -> None:
        """Call back, if it still is writable."""
        if self.on_writable is not None and self.writable:
            self.on_writable()
