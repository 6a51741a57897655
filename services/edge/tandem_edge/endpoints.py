"""The frontends in the form in which Envoy takes them from a file it watches.

Pure but for `replace`. Envoy asks nobody for them over the network: its resource form is JSON here, so that no
protobufs of Envoy are needed. Which frontends there are is `discovery.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLUSTER = "frontends"
"""Its name in the template."""
ASSIGNMENT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One address that Envoy may send requests to."""

    host: str
    """An IP address; here Envoy resolves no names."""
    port: int
    is_draining: bool = False
    """Gets no new request; those it has go on."""


def assignment(endpoints: Sequence[Endpoint]) -> bytes:
    """All of them as the answer of Envoy's discovery of endpoints.

    Where everyone drains, nobody is marked: who still takes requests is then for Envoy's health checks to say.
    """
    all_drain = all(endpoint.is_draining for endpoint in endpoints)
    entries = [_entry(endpoint, endpoint.is_draining and not all_drain) for endpoint in endpoints]
    resource = {"@type": ASSIGNMENT, "cluster_name": CLUSTER, "endpoints": [{"lb_endpoints": entries}]}
    return json.dumps({"resources": [resource]}).encode()


def _entry(endpoint: Endpoint, is_draining: bool) -> dict[str, Any]:
    address = {"socket_address": {"address": endpoint.host, "port_value": endpoint.port}}
    return {"endpoint": {"address": address}, **({"health_status": "DRAINING"} if is_draining else {})}


def replace(file: Path, content: bytes) -> None:
    """A new content by a rename, which is what Envoy watches for: it never reads half a file.

    Raises:
        OSError: it cannot be written; the former content stays.
    """
    partial = file.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_bytes(content)
    partial.replace(file)
