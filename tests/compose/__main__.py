"""`make compose-test`: builds the images, runs the composed cluster through `scenario.py`, and tears it down.

    python -m tests.compose                   # on the Docker engine that this machine runs
    python -m tests.compose --debian-engine   # as root on Debian: installs docker.io, starts an engine of its own

Ends with status 0 when every step held, 1 when one did not, 2 where there is no engine. What it reports is also in
`.cache/compose-test.log`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.compose import scenario, standins
from tests.compose.cluster import ALL, Cluster
from tests.compose.debian_engine import debian_engine
from tests.compose.docker import BUILD_TIMEOUT_S, REPOSITORY, CommandFailed, Docker, NoEngineError, find_docker
from tests.compose.package_source import package_source

LOG = REPOSITORY / ".cache" / "compose-test.log"
IMAGES = ("registry", "frontend", "edge", "prefill", "decode")
MB = 10**6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compose", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--debian-engine", action="store_true", help="install and start an engine, as root on Debian")
    parser.add_argument("--keep", action="store_true", help="leave the cluster running where a step failed")
    given = parser.parse_args()
    try:
        with contextlib.ExitStack() as stack:
            environment = stack.enter_context(debian_engine()) if given.debian_engine else {}
            docker = find_docker(environment)
            return run(docker, keep=given.keep)
    except NoEngineError as problem:
        print(f"compose-test: {problem}; start a Docker engine, or as root on Debian: make compose-test ENGINE=debian")
        return 2


def run(docker: Docker, *, keep: bool) -> int:
    """Build, go through the steps, tear down. Returns the exit status."""
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("")
    cluster = Cluster(docker, scenario.settings())
    try:
        _build(docker, cluster)
        for step in scenario.STEPS:
            begin_s = time.monotonic()
            step(cluster, report)
            report(f"ok      {step.__name__} ({time.monotonic() - begin_s:.0f} s)\n")
    except (AssertionError, CommandFailed) as problem:
        report(f"FAILED  {problem}")
        _report_logs(cluster)
        if not keep:
            cluster.compose("down", "--volumes", "--timeout", "10", check=False)
        return 1
    return 0


def report(line: str) -> None:
    """One line, here and in the log."""
    print(line, flush=True)
    with LOG.open("a") as log:
        log.write(line + "\n")


def _build(docker: Docker, cluster: Cluster) -> None:
    made = standins.prepare(docker)
    if made:
        report(f"local stand-ins, because they cannot be pulled: {', '.join(made)}")
    begin_s = time.monotonic()
    with _source() as settings:
        docker.compose("build", timeout_s=BUILD_TIMEOUT_S, settings={**cluster.settings, **settings})
    report(f"build: {time.monotonic() - begin_s:.0f} s")
    for name in IMAGES:
        [image] = [tag for tag in _tags(docker) if tag.startswith(f"tandem/{name}:")]
        report(f"image {image}: {docker.inspect(image)['Size'] / MB:.0f} MB")
    report(
        f"of these, the base {standins.python_image()}: {docker.inspect(standins.python_image())['Size'] / MB:.0f} MB\n"
    )


@contextlib.contextmanager
def _source() -> Iterator[dict[str, str]]:
    """This machine's package index, for the builds."""
    with tempfile.TemporaryDirectory(prefix="tandem-build-") as work, package_source(Path(work)) as source:
        yield {"PIP_CONF": str(source.pip_conf), "CA_BUNDLE": str(source.ca_bundle), "BUILD_NETWORK": "host"}


def _tags(docker: Docker) -> list[str]:
    return docker.run("images", "--format", "{{.Repository}}:{{.Tag}}").split()


def _report_logs(cluster: Cluster) -> None:
    for service in ALL:
        with contextlib.suppress(AssertionError):
            report(f"--- {service}\n{cluster.logs(service)[-1500:]}")


if __name__ == "__main__":
    sys.exit(main())
