"""gRPC fork handlers are disabled before gRPC is imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = (
    "import sys; from tandem.service.startup import GRPC_FORKS, begin; begin();"
    "assert 'grpc' not in sys.modules; import os; print(os.environ[GRPC_FORKS])"
)


def test_grpc_is_told_before_it_is_imported_that_nothing_goes_on_after_a_fork() -> None:
    """Its handlers run in the forks of uvloop, which would die in them now and then."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout == "0\n"
