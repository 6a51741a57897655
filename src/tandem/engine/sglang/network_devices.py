"""Network devices by the names that UCX knows, from what the kernel publishes of this machine.

UCX ignores a name that it does not know with one line in its log, and uses the others or nothing: the hand-over then
fails with the first request. Here the worker refuses to start.
"""

from __future__ import annotations

import re
from pathlib import Path

from tandem.errors import StartError

INTERFACES = Path("/sys/class/net")
RDMA_DEVICES = Path("/sys/class/infiniband")
ANY = re.compile(r"all|.*[*?].*")
"""Every device, or a pattern of UCX, which UCX itself resolves."""


def check_devices(listed: str | None) -> None:
    """Check a value of UCX_NET_DEVICES; None: not set.

    Raises:
        StartError: a device is not on this machine; names those that are.
    """
    if listed is None or not INTERFACES.is_dir():
        return
    known = _known()
    # A leading ^ excludes the devices: one that is not there does no harm.
    for device in [] if listed.startswith("^") else listed.split(","):
        if not ANY.fullmatch(device) and device not in known:
            raise StartError(
                f"ucx_net_devices: {device!r} is not a network device of this machine: {', '.join(sorted(known))}"
            )


def _known() -> set[str]:
    interfaces = {path.name for path in INTERFACES.iterdir() if path.is_dir()}
    ports = RDMA_DEVICES.glob("*/ports/*") if RDMA_DEVICES.is_dir() else ()
    # UCX takes a card with and without the number of its port.
    return interfaces | {name for port in ports for name in (_card(port), f"{_card(port)}:{port.name}")}


def _card(port: Path) -> str:
    return port.parents[1].name
