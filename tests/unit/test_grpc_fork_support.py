"""gRPC fork handlers are disabled before gRPC is imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = (
    "import sys; from tandem.service.startup import GRPC_FORKS, begin; begin();"
    "assert 'grpc' not in sys.modules; import os; print(os.environ[GRPC_FORKS])"
)


def test_grpc_fork_support_is_off_before_the_import() -> None:
    """Its handlers run in the forks of uvloop, which would die in them now and then."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout == "0\n"
