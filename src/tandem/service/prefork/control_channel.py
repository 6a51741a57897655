"""Messages between a parent and one of its children, over a pair of Unix sockets that only the two of them have.

Owns the framing: a line of JSON for each message, and a descriptor beside the message that says it brings one. What the
messages mean is `prefork_process`'s and `prefork_child`'s. Both ends run the same release: a line that cannot be read
is a defect.
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
"""Taken by one read. The kernel ends a read at each message that brings descriptors; more of them would be lost."""
CARRIES = "carries"
"""The key of a message that brings a descriptor."""
KIND = "kind"
"""The key that says what a message is."""

Message = dict[str, Any]
OnMessage = Callable[[Message, int | None], None]


class ControlChannel:
    """One end. Used by blocking calls until `begin`, and on the event loop from then on."""

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
        """Whether something waits because the other end does not read."""
        return bool(self._unsent)

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is sent or received."""
        return self._is_closed

    # Before there is an event loop.

    def receive_blocking(self) -> tuple[Message, int | None] | None:
        """The next message; None: the other end is gone."""
        while (found := next(self._messages(), None)) is None:
            if not self._read():
                return None
        return found

    def send_blocking(self, kind: str, **fields: Any) -> None:
        """Send a message, and return when it has been taken.

        Raises:
            OSError: the other end is gone.
        """
        self._socket.sendall(_line(kind, fields))

    # On the event loop.

    def begin(self, on_message: OnMessage, on_close: Callable[[], None]) -> None:
        """Hand on every message, with its descriptor; `on_close` is called once, when the other end is gone."""
        self._on_message, self._on_close = on_message, on_close
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._on_readable)
        self._hand_on()

    def send(self, kind: str, descriptor: int | None = None, **fields: Any) -> None:
        """Send a message in order; what the other end does not take yet waits here. Nothing after the end.

        A descriptor must stay open until the other end has answered.
        """
        if self._is_closed:
            return
        more = {} if descriptor is None else {CARRIES: True}
        self._unsent.append((_line(kind, {**fields, **more}), descriptor))
        if len(self._unsent) == 1:
            self._flush()

    def read_rest(self) -> None:
        """Hand on what has come before the other end went. For the end of a process, whose last words count."""
        while not self._is_closed:
            try:
                if not self._read():
                    break
            except BlockingIOError:
                break
        self._hand_on()

    def close(self) -> None:
        """Send and receive nothing more. Harmless twice."""
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
        self._hand_on()
        if not is_open and not self._is_closed:
            self.close()
            self._on_close()

    def _read(self) -> bool:
        """Take what has come; False: the other end is gone."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, READ_BYTES, DESCRIPTORS_MAX)
        except ConnectionError:
            return False
        for descriptor in descriptors:
            # A process that is started from here must not have it.
            os.set_inheritable(descriptor, False)
        self._descriptors.extend(descriptors)
        self._received += data
        return bool(data)

    def _hand_on(self) -> None:
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
                # The other end is gone, which the next read reports as well.
                self._unsent.clear()
                return
            if count < len(line):
                # The descriptor has gone with the first byte.
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
