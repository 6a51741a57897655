"""One scrape of several processes: fetches the text of each and adds a label with the process to every sample.

Works on the exposition text, in both formats that Prometheus reads, without parsing values. A process that cannot be
scraped is left out and logged once. Owns no listener.
"""

from __future__ import annotations

import http.client
import logging
import re
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

log = logging.getLogger(__name__)

LABEL = "tandem_process"
"""Not `process`: the scrape target has that label already, and Prometheus would rename one of them."""
TIMEOUT_S = 2.0
"""Longer than a busy process takes to read its gauges (`otel_metrics.READ_TIMEOUT_S`)."""
ABOUT = re.compile(r"# (?:HELP|TYPE|UNIT) (\S+)")
NAME = re.compile(r"[^{ ]+")
END = "# EOF"


def merged(texts: Mapping[str, str]) -> str:
    """Merge the texts, keyed by label value. The format requires all samples of a metric to be adjacent."""
    about: dict[str, dict[str, None]] = {}
    samples: dict[str, list[str]] = {}
    has_end = False
    for process, text in texts.items():
        family = ""
        for line in text.splitlines():
            found = ABOUT.match(line)
            if found is not None:
                family = found[1]
                about.setdefault(family, {})[line] = None
            elif line == END:
                has_end = True
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(_labelled(line, process))
    lines = [line for family in {**about, **samples} for line in (*about.get(family, ()), *samples.get(family, ()))]
    return "".join(f"{line}\n" for line in (*lines, *([END] if has_end else [])))


def _labelled(sample: str, process: str) -> str:
    found = NAME.match(sample)
    assert found is not None, "a sample starts with the metric name"
    name, rest = found[0], sample[found.end() :]
    if not rest.startswith("{"):
        return f'{name}{{{LABEL}="{process}"}}{rest}'
    comma = "" if rest.startswith("{}") else ","
    return f'{name}{{{LABEL}="{process}"{comma}{rest[1:]}'


class LocalScrapes:
    """The scrape endpoints of other local processes, keyed by label value."""

    def __init__(self, sockets: Mapping[str, Path]) -> None:
        self._sockets = sockets
        self._failing: set[str] = set()

    def texts(self, accept: str) -> dict[str, str]:
        """Scrape all of them, in the format of the `accept` header. Blocks for at most `TIMEOUT_S`."""
        with ThreadPoolExecutor(len(self._sockets)) as pool:
            return dict(self._responses(pool, accept))

    def _responses(self, pool: ThreadPoolExecutor, accept: str) -> Iterator[tuple[str, str]]:
        scrapes = {process: pool.submit(_scrape, path, accept) for process, path in self._sockets.items()}
        for process, scrape in scrapes.items():
            try:
                yield process, scrape.result()
            except (OSError, http.client.HTTPException) as problem:
                if process not in self._failing:
                    log.warning(
                        "metrics of process %s cannot be scraped and are left out: %s",
                        process,
                        problem or type(problem).__name__,
                    )
                self._failing.add(process)
            else:
                self._failing.discard(process)


def _scrape(path: Path, accept: str) -> str:
    connection = _LocalConnection(path)
    try:
        connection.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
        response = connection.getresponse()
        body = response.read().decode()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"status {response.status}")
        return body
    finally:
        connection.close()


class _LocalConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))
