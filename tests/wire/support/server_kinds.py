"""The two servers, for tests of what both have to do."""

from __future__ import annotations

import pytest

from tandem.rpc.http2.server import Http2RpcServer
from tandem.rpc.server import RpcServer
from tandem.rpc.service_host import ServiceHost

KINDS: dict[str, type[ServiceHost]] = {"grpc_aio": RpcServer, "h2": Http2RpcServer}

on_both_servers = pytest.mark.parametrize("server_type", KINDS.values(), ids=KINDS)
