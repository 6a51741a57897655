"""Names by which `tandem profile` finds a frontend."""

from __future__ import annotations

import pytest

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.types.v1 import worker_pb2
from tandem.cli import profile
from tandem.cli.membership import Membership
from tandem.errors import StartError


def fleet(*frontends: str) -> Membership:
    entries = [worker_pb2.Frontend(frontend_id=name, address=f"{name}:1") for name in frontends]
    listed = [pb.ListedFrontend(frontend=entry) for entry in entries]
    return Membership(workers=(), frontends=tuple(listed), responses=())


@pytest.mark.parametrize(
    ("registered", "asked", "found"),
    [
        (("frontend",), "frontend-0", "frontend:1"),
        (("frontend",), "frontend", "frontend:1"),
        (("frontend-0", "frontend-1"), "frontend", "frontend-0:1"),
        (("frontend-0", "frontend-1"), "frontend-1", "frontend-1:1"),
    ],
)
async def test_the_first_frontend_has_two_names(
    monkeypatch: pytest.MonkeyPatch, registered: tuple[str, ...], asked: str, found: str
) -> None:
    async def ask_all(*_: object) -> Membership:
        return fleet(*registered)

    monkeypatch.setattr(profile, "ask_all", ask_all)
    assert await profile.address_of(asked, ["r:1"], None) == found
    with pytest.raises(StartError, match="no worker or frontend frontend-7 is registered"):
        await profile.address_of("frontend-7", ["r:1"], None)
