"""The frontends as Envoy's EDS reads them from a file it watches.

Pure but for `replace`. A file needs neither an xDS server nor Envoy's protobufs: the resources are JSON. `discovery.py`
decides which frontends there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLUSTER = "frontends"
"""Name of the Envoy cluster in the template."""
ASSIGNMENT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One address that Envoy may send requests to."""

    host: str
    """An IP address: EDS does not resolve names."""
    port: int
    is_draining: bool = False
    """Gets no new requests; open ones continue."""


def assignment(endpoints: Sequence[Endpoint]) -> bytes:
    """All endpoints as an EDS response, in JSON.

    If all of them are draining, none is marked as such: Envoy would answer 503, although some may still accept
    requests.
    """
    all_drain = all(endpoint.is_draining for endpoint in endpoints)
    entries = [_entry(endpoint, endpoint.is_draining and not all_drain) for endpoint in endpoints]
    resource = {"@type": ASSIGNMENT, "cluster_name": CLUSTER, "endpoints": [{"lb_endpoints": entries}]}
    return json.dumps({"resources": [resource]}).encode()


def _entry(endpoint: Endpoint, is_draining: bool) -> dict[str, Any]:
    address = {"socket_address": {"address": endpoint.host, "port_value": endpoint.port}}
    return {"endpoint": {"address": address}, **({"health_status": "DRAINING"} if is_draining else {})}


def replace(file: Path, content: bytes) -> None:
    """Replace the file atomically by a rename, which is the event that Envoy watches for.

    Raises:
        OSError: the write failed; the previous content stays.
    """
    partial = file.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_bytes(content)
    partial.replace(file)
