"""From the registry's list to endpoints: addresses, names, and what is kept when a lookup or a write fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tandem_edge.discovery import endpoints_of
from tandem_edge.dns import Families, Names, resolve_by_system
from tandem_edge.endpoints import Endpoint, replace

from tandem.domain.frontend import Frontend
from tandem.domain.worker import WorkerState


def frontend(address: str, is_draining: bool = False) -> Frontend:
    state = WorkerState.DRAINING if is_draining else WorkerState.SERVING
    return Frontend(frontend_id=f"{address}-{state.value}", epoch=1, address=address, model="tiny", state=state)


def test_each_place_is_an_endpoint_once() -> None:
    frontends = [
        frontend("10.0.0.2:5"),
        frontend("[::1]:5", is_draining=True),
        frontend("two:6"),
        frontend("10.0.0.2:5", is_draining=True),  # a former start, which the registry has not given up yet
        frontend("unknown:7"),
    ]
    addresses = {
        ("10.0.0.2", 5): ("10.0.0.2",),
        ("::1", 5): ("::1",),
        ("two", 6): ("10.0.0.3", "10.0.0.4"),
        ("unknown", 7): (),
    }
    assert endpoints_of(frontends, addresses) == (
        Endpoint("10.0.0.2", 5),
        Endpoint("10.0.0.3", 6),
        Endpoint("10.0.0.4", 6),
        Endpoint("::1", 5, is_draining=True),
    )


async def test_the_last_answer_for_a_name_is_kept() -> None:
    asked: list[str] = []

    async def ask(host: str) -> tuple[str, ...]:
        asked.append(host)
        if len(asked) > 1:
            raise OSError("no server responds")
        return ("10.0.0.9",)

    names = Names(ask)
    for _ in range(2):
        assert await names.addresses(["frontend", "10.0.0.1"]) == {"frontend": ("10.0.0.9",), "10.0.0.1": ("10.0.0.1",)}
    assert asked == ["frontend", "frontend"]
    assert await names.addresses([]) == {}
    assert await names.addresses(["frontend"]) == {"frontend": ()}


async def test_the_systems_ipv4_addresses_come_first() -> None:
    assert (await resolve_by_system("localhost"))[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("listens", "chosen"),
    [
        ({"10.0.0.1", "fd00::1"}, ("10.0.0.1",)),
        ({"fd00::1"}, ("fd00::1",)),
        (set(), ("10.0.0.1",)),
    ],
)
async def test_a_name_of_both_families_is_the_one_that_accepts_connections(
    listens: set[str], chosen: tuple[str, ...]
) -> None:
    asked: list[str] = []

    async def connects(host: str, port: int) -> bool:
        asked.append(host)
        return host in listens

    families, both = Families(connects), ("10.0.0.1", "fd00::1")
    for _ in range(2):
        assert await families.reachable(both, 5) == chosen
        families.keep_only({(both, 5)})
    tries_once = 1 if "10.0.0.1" in listens else 2
    assert len(asked) == (tries_once if listens else 2 * tries_once)
    families.keep_only(())
    listens.clear()
    listens.add("fd00::1")
    assert await families.reachable(both, 5) == ("fd00::1",)
    assert await families.reachable(("10.0.0.7",), 5) == ("10.0.0.7",)


def test_a_file_is_replaced_by_a_rename_and_stays_private(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.json"
    replace(file, b"1")
    inode = file.stat().st_ino
    with file.open("rb") as before:
        replace(file, b"22")
        assert before.read() == b"1"
    assert file.read_bytes() == b"22"
    assert file.stat().st_ino != inode
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["endpoints.json"]


def test_a_failed_write_of_endpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        replace(tmp_path / "gone" / "endpoints.json", b"1")
