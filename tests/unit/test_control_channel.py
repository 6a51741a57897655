"""Messages and descriptors between a parent and a child: whole, in order, each descriptor with its own message."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import psutil
import pytest

from tandem.service.prefork.control_channel import KIND, ControlChannel, Message
from tandem.testing.eventually import assert_eventually


class End(ControlChannel):
    """An end of a test's that keeps what it hears."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end)
        self.heard: list[tuple[Message, int | None]] = []
        self.closes = 0

    def open(self) -> None:
        self.begin(lambda message, descriptor: self.heard.append((message, descriptor)), self.count_close)

    def count_close(self) -> None:
        self.closes += 1


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    ours, theirs = socket.socketpair()
    pair = End(ours), End(theirs)
    yield pair
    for end in pair:
        end.close()


async def test_each_descriptor_comes_with_its_message(ends: tuple[End, End]) -> None:
    parent, child = ends
    parent.open()
    child.open()
    pipes = [os.pipe() for _ in range(40)]
    for number, (reading, _writing) in enumerate(pipes):
        parent.send("plain", number=number)
        parent.send("file", reading, number=number)
    await assert_eventually(lambda: len(child.heard) == 80)
    for number, (_, writing) in enumerate(pipes):
        (plain, nothing), (message, descriptor) = child.heard[2 * number : 2 * number + 2]
        assert (plain, nothing) == ({KIND: "plain", "number": number}, None)
        assert message == {KIND: "file", "number": number}
        assert descriptor is not None
        os.write(writing, str(number).encode())
        assert os.read(descriptor, 10) == str(number).encode()
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
    for reading, writing in pipes:
        os.close(reading)
        os.close(writing)


async def test_an_unread_message_waits_and_arrives_whole(ends: tuple[End, End]) -> None:
    parent, child = ends
    parent.open()
    reading, writing = os.pipe()
    text = "x" * 50_000
    for number in range(20):
        parent.send("long", reading if number == 10 else None, text=text, number=number)
    assert parent.is_backed_up
    await asyncio.sleep(0)
    child.open()
    await assert_eventually(lambda: len(child.heard) == 20)
    assert [message["number"] for message, _ in child.heard] == list(range(20))
    assert {message["text"] for message, _ in child.heard} == {text}
    assert [descriptor is not None for _, descriptor in child.heard] == [number == 10 for number in range(20)]
    assert not parent.is_backed_up
    for descriptor in (reading, writing, child.heard[10][1]):
        assert descriptor is not None
        os.close(descriptor)


async def test_the_end_is_reported_once_after_the_last_message(ends: tuple[End, End]) -> None:
    parent, child = ends
    parent.open()
    child.open()
    child.send("last")
    child.close()
    child.send("nothing more")
    await assert_eventually(lambda: parent.closes)
    assert [message[KIND] for message, _ in parent.heard] == ["last"]
    assert parent.is_closed
    parent.close()
    assert (parent.closes, child.closes) == (1, 0)


async def test_the_last_words_of_a_process_can_be_read_when_it_has_ended(ends: tuple[End, End]) -> None:
    """Its end may be known before its channel was looked at."""
    parent, child = ends
    parent.open()
    child.open()
    child.send("one")
    child.send("two")
    child.close()
    parent.read_rest()
    assert [message[KIND] for message, _ in parent.heard] == ["one", "two"]


async def test_to_one_that_is_gone_nothing_is_sent_and_nothing_is_raised(ends: tuple[End, End]) -> None:
    parent, child = ends
    parent.open()
    child.close()
    parent.send("late")
    await assert_eventually(lambda: parent.closes == 1)


async def test_before_the_loop_messages_are_read_one_by_one(ends: tuple[End, End]) -> None:
    parent, child = ends
    parent.send_blocking("begin", number=1)
    parent.send_blocking("next")
    assert child.receive_blocking() == ({KIND: "begin", "number": 1}, None)
    child.open()
    assert child.heard == [({KIND: "next"}, None)], "what has come with it is not lost"


def test_before_the_loop_the_other_ends_going_is_seen(ends: tuple[End, End]) -> None:
    parent, child = ends
    parent.close()
    assert child.receive_blocking() is None


async def test_descriptors_that_were_not_taken_are_closed(ends: tuple[End, End]) -> None:
    parent, child = ends
    reading, writing = os.pipe()
    parent.open()
    before = psutil.Process().num_fds()
    parent.send("file", reading)
    child.begin(lambda message, descriptor: child.close(), lambda: None)
    parent.send("file", reading)
    await assert_eventually(lambda: child.is_closed)
    assert psutil.Process().num_fds() <= before + 1, "but for the one that was handed on"
    os.close(reading)
    os.close(writing)
