"""A handler's error meets a call whose client is gone: that is an end, and no defect."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tandem.errors import Draining
from tandem.rpc.status import abort


class DeadCall:
    """What gRPC's context does when its call has ended underneath."""

    async def abort(self, *arguments: Any) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def test_an_error_after_the_client_left_is_a_cancelled_call() -> None:
    with pytest.raises(asyncio.CancelledError):
        await abort(DeadCall(), Draining("going away"))  # type: ignore[arg-type]
