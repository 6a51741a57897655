"""A second machine, as far as the network is concerned: a network namespace with one link to this one.

Owns the namespace and the link, which can be cut without a word to either end. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

NETWORK = "10.217.{}.{}"


def is_possible() -> bool:
    """Whether this process may make namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"tandem-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


class OtherMachine:
    """Use `other_machine`."""

    def __init__(self, number: int) -> None:
        self.name = f"tandem-{os.getpid()}-{number}"
        self.our_address = NETWORK.format(number, 1)
        """This machine's address on the link."""
        self._its_address = NETWORK.format(number, 2)
        self._our_end, self._its_end = f"td{number}a{os.getpid() % 10**6}", f"td{number}b{os.getpid() % 10**6}"

    def command(self, *command: str) -> list[str]:
        """A command that runs there."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut(self) -> None:
        """Its end of the link drops everything from now on."""
        self._there("link", "set", self._its_end, "down")

    def heal(self) -> None:
        """Its end of the link works. May be called twice."""
        self._there("link", "set", self._its_end, "up")

    def make(self) -> None:
        """Make the namespace and its link."""
        _ip("netns", "add", self.name)
        _ip("link", "add", self._our_end, "type", "veth", "peer", "name", self._its_end, "netns", self.name)
        _ip("addr", "add", f"{self.our_address}/30", "dev", self._our_end)
        _ip("link", "set", self._our_end, "up")
        self._there("addr", "add", f"{self._its_address}/30", "dev", self._its_end)
        self.heal()

    def _there(self, *arguments: str) -> None:
        _ip("-netns", self.name, *arguments)


@contextmanager
def other_machine(number: int = os.getpid() % 250 + 1) -> Iterator[OtherMachine]:
    """A machine with a link to this one; `number`, from 1 to 250, is the third part of the addresses."""
    machine = OtherMachine(number)
    try:
        machine.make()
        yield machine
    finally:
        # The link goes with its end in the namespace.
        subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
