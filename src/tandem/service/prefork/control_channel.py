"""Messages between a parent and one of its children, over a private pair of Unix sockets.

Owns the framing: one line of JSON per message, with a file descriptor attached where the message says so. The messages
are defined in `process` and `child`. Both ends run the same release, so a line that cannot be parsed is a bug.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

READ_BYTES = 64 * 2**10
DESCRIPTORS_MAX = 16
"""Per read. The kernel ends a read after each message with descriptors; more than this would be lost."""
CARRIES = "carries"
"""Key of a message with an attached descriptor."""
KIND = "kind"
"""Key of the message type."""

Message = dict[str, Any]
OnMessage = Callable[[Message, int | None], None]


class ControlChannel:
    """One end. Used by blocking calls before `begin`, and on the event loop afterwards."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._unsent: deque[tuple[bytes, int | None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._on_message: OnMessage
        self._on_close: Callable[[], None]

    @property
    def is_backed_up(self) -> bool:
        """Whether messages are queued because the other end does not read."""
        return bool(self._unsent)

    @property
    def is_closed(self) -> bool:
        """Whether it is closed."""
        return self._is_closed

    # Before there is an event loop.

    def receive_blocking(self) -> tuple[Message, int | None] | None:
        """The next message; None: the other end is closed."""
        while (found := next(self._messages(), None)) is None:
            if not self._read():
                return None
        return found

    def send_blocking(self, kind: str, **fields: Any) -> None:
        """Send a message, and return when the kernel has it.

        Raises:
            OSError: the other end is closed.
        """
        self._socket.sendall(_line(kind, fields))

    # On the event loop.

    def begin(self, on_message: OnMessage, on_close: Callable[[], None]) -> None:
        """Call `on_message` with each message and its descriptor, and `on_close` once, after the peer has closed."""
        self._on_message, self._on_close = on_message, on_close
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._on_readable)
        self._deliver()

    def send(self, kind: str, descriptor: int | None = None, **fields: Any) -> None:
        """Send a message in order; queued while the other end does not read. Does nothing once closed.

        A descriptor must stay open until the other end has confirmed it.
        """
        if self._is_closed:
            return
        more = {} if descriptor is None else {CARRIES: True}
        self._unsent.append((_line(kind, {**fields, **more}), descriptor))
        if len(self._unsent) == 1:
            self._flush()

    def read_rest(self) -> None:
        """Call `on_message` with each message and its descriptor, and `on_close` once, when the peer is closed."""
        while not self._is_closed:
            try:
                if not self._read():
                    break
            except BlockingIOError:
                break
        self._deliver()

    def close(self) -> None:
        """Close it. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._socket.close()
        self._unsent.clear()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _on_readable(self) -> None:
        try:
            is_open = self._read()
        except BlockingIOError:
            return
        self._deliver()
        if not is_open and not self._is_closed:
            self.close()
            self._on_close()

    def _read(self) -> bool:
        """Read received data; False: the other end is closed."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, READ_BYTES, DESCRIPTORS_MAX)
        except ConnectionError:
            return False
        for descriptor in descriptors:
            # Processes started by this one must not inherit it.
            os.set_inheritable(descriptor, False)
        self._descriptors.extend(descriptors)
        self._received += data
        return bool(data)

    def _deliver(self) -> None:
        for message, descriptor in self._messages():
            self._on_message(message, descriptor)
            if self._is_closed:
                return

    def _messages(self) -> Iterator[tuple[Message, int | None]]:
        while (end := self._received.find(b"\n")) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            message: Message = json.loads(line)
            yield message, self._descriptors.popleft() if message.pop(CARRIES, False) else None

    def _flush(self) -> None:
        while self._unsent:
            line, descriptor = self._unsent[0]
            try:
                if descriptor is None:
                    count = self._socket.send(line)
                else:
                    count = socket.send_fds(self._socket, [line], [descriptor])
            except BlockingIOError:
                self._flush_later()
                return
            except OSError:
                # The other end is closed, which the next read reports.
                self._unsent.clear()
                return
            if count < len(line):
                # The descriptor was sent with the first byte.
                self._unsent[0] = line[count:], None
            else:
                self._unsent.popleft()
        if self._loop is not None:
            self._loop.remove_writer(self._socket)

    def _flush_later(self) -> None:
        assert self._loop is not None, "send() before begin()"
        self._loop.add_writer(self._socket, self._flush)


def _line(kind: str, fields: Mapping[str, Any]) -> bytes:
    return json.dumps({KIND: kind, **fields}).encode() + b"\n"
