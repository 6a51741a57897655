"""A fresh interpreter: what a service imports at its start, in which order, and what it keeps of it."""

from __future__ import annotations

import subprocess
import sys

FORKS_PROGRAM = (
    "import sys; from tandem.service.startup import GRPC_FORKS, begin; begin();"
    "assert 'grpc' not in sys.modules; import os; print(os.environ[GRPC_FORKS])"
)

SERVING = """
import asyncio, gc
from tandem.service.process import serve

class Idle:
    address, metrics_port = "127.0.0.1:1", 0
    async def __aenter__(self):
        self.before = gc.get_freeze_count()
        return self
    async def __aexit__(self, *exception): pass
    async def wait_finished(self): self.serving = gc.get_freeze_count()
    async def drain(self): return True

asyncio.run(serve(service := Idle()))
print(service.before, service.serving)
"""


def test_a_frontend_and_its_parsers_import_no_engine() -> None:
    program = (
        "import sys, tandem_frontend.app, tandem.output_parsers;"
        "print({'torch', 'sglang', 'transformers'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_process_that_exports_nothing_imports_nothing_for_it() -> None:
    program = (
        "import sys, tandem_frontend.app, tandem_registry.app, tandem_edge.app, tandem.worker.app;"
        "print({name for name in sys.modules if name.startswith('opentelemetry')})"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_no_service_loads_the_screen_or_the_profiler() -> None:
    services = "tandem_frontend.app, tandem.worker.app, tandem_registry.app, tandem.cli.app"
    program = f"import sys, {services}; print({{'textual', 'pyinstrument'}} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_frontend_without_metrics_imports_no_exporter() -> None:
    program = (
        "import sys, tandem_frontend.app, tandem.worker.app, tandem_registry.app, tandem_edge.app\n"
        "from tandem_frontend.config import FrontendConfig\n"
        "tandem_frontend.app.FrontendApp.open(FrontendConfig(registry='127.0.0.1:1', model='m'))\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('opentelemetry', 'prometheus_client')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_grpc_fork_support_is_off_before_the_import() -> None:
    """Its handlers run in the forks of uvloop, which would die in them now and then."""
    found = subprocess.run([sys.executable, "-c", FORKS_PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout == "0\n"


def test_serve_after_the_start_keeps_what_exists_from_the_garbage_collector() -> None:
    done = subprocess.run([sys.executable, "-c", SERVING], capture_output=True, text=True, check=True)
    before, serving = map(int, done.stdout.split())
    assert before == 0
    assert serving > 10_000
