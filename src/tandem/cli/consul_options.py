"""Consul on the command line: validates the Consul options of `tandem up` and finds the addresses it prints.

Owns these options and the environment variables shared with Consul's own tools. Tokens are never printed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tandem.cli.arguments import CONSUL as OPTION
from tandem.cli.arguments import LOCAL
from tandem.errors import ConfigError, StartError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.local_cluster.consul import DEFAULT_SERVICE, ClusterConsul
from tandem.local_cluster.consul_binary import find_consul
from tandem.local_cluster.consul_http import ConsulAccess, read_token_file

ADDRESS = re.compile(r"(https?://)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?")
SERVICE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def read_options(
    address: str | None,
    service: str = DEFAULT_SERVICE,
    *,
    token_file: Path | None = None,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    environ: Mapping[str, str],
) -> ClusterConsul | None:
    """Consul settings of the cluster; None: the cluster does not use Consul.

    Raises:
        ConfigError: an option is wrong or requires another one; names it.
    """
    given = {"consul_token_file": token_file, "consul_ca": ca, "consul_cert": cert, "consul_key": key}
    if address is None or address == LOCAL:
        for name, value in given.items():
            if value is not None:
                raise ConfigError(name, f"requires {OPTION} ADDRESS (an existing agent)")
    if not SERVICE.fullmatch(service):
        raise ConfigError("consul_service", f"must be a DNS label (a-z, 0-9, '-'; 63 at most), not {service!r}")
    if address is None:
        if service != DEFAULT_SERVICE:
            raise ConfigError("consul_service", f"requires {OPTION}")
        return None
    if address == LOCAL:
        return ClusterConsul(service=service)
    if not ADDRESS.fullmatch(address) or not ("://" in address or re.search(r":[0-9]+$", address)):
        raise ConfigError("consul", f"must be host:port, or an http or https URL, not {address!r}")
    if (cert is None) != (key is None):
        raise ConfigError(
            "consul_key" if key is None else "consul_cert",
            "is missing: certificate and key are required together",
        )
    if cert is not None and ca is None:
        raise ConfigError("consul_ca", "is missing: it verifies the certificate of the agent")
    token = environ.get("CONSUL_HTTP_TOKEN", "").strip() if token_file is None else ""
    if token_file is None and not token and environ.get("CONSUL_HTTP_TOKEN_FILE"):
        token_file = Path(environ["CONSUL_HTTP_TOKEN_FILE"])
    return ClusterConsul(
        address=address, service=service, token=token, token_file=token_file, ca=ca, cert=cert, key=key
    )


async def check_consul(spec: ClusterSpec, console: Console) -> None:
    """Check that Consul is reachable; for a local agent, download its binary if needed.

    Raises:
        ConfigError: names the option.
        StartError: Consul is unreachable or has no leader, or its binary cannot be found or downloaded.
    """
    consul = spec.consul
    if consul is None:
        return
    if consul.address is None:
        await asyncio.to_thread(find_consul, report=lambda line: console.print(line, highlight=False, soft_wrap=True))
        return
    try:
        if consul.token_file is not None:
            read_token_file(consul.token_file)
    except StartError as problem:
        raise ConfigError("consul_token_file", str(problem)) from None
    if not await consul.access(spec.tls).get("/v1/status/leader"):
        raise StartError(f"Consul at {consul.address} has no leader")


def consul_url(cluster: LocalCluster) -> str | None:
    """URL of Consul's HTTP API; None: the cluster does not use Consul."""
    access = _access(cluster)
    return None if access is None else access.url


async def dns_address(cluster: LocalCluster) -> str | None:
    """host:port of Consul's DNS; None: not used, or the agent does not report it."""
    access = _access(cluster)
    if access is None:
        return None
    if cluster.consul is not None:
        return cluster.consul.dns
    try:
        agent = await access.get("/v1/agent/self")
        port = int(agent["DebugConfig"]["DNSPort"])
    except (StartError, KeyError, TypeError, ValueError):
        # An ACL token for the registry alone may lack agent:read; the address is only a hint.
        return None
    host = re.sub(r"^https?://|:[0-9]+/?$|/$", "", access.url)
    return f"{host}:{port}" if port > 0 else None


def _access(cluster: LocalCluster) -> ConsulAccess | None:
    if cluster.consul is not None:
        return cluster.consul.access
    return None if cluster.spec.consul is None else cluster.spec.consul.access(cluster.spec.tls)
