"""One scrape of several processes: each is asked for its own text, and every sample gets a label with its process.

Works on the text, in either of the two forms that Prometheus reads: what a process measures is not taken apart and made
anew. A process that does not answer is left out, which is logged once. Owns no listener.
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
"""Not `process`: that is the target's own label, and Prometheus would rename one of the two."""
TIMEOUT_S = 2.0
"""Longer than a busy process takes for its gauges (`otel.READ_TIMEOUT_S`)."""
ABOUT = re.compile(r"# (?:HELP|TYPE|UNIT) (\S+)")
NAME = re.compile(r"[^{ ]+")
END = "# EOF"


def merged(texts: Mapping[str, str]) -> str:
    """Texts of processes as one, by the value of the label. What belongs to one metric stands together."""
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
    assert found is not None, "a sample begins with its name"
    name, rest = found[0], sample[found.end() :]
    if not rest.startswith("{"):
        return f'{name}{{{LABEL}="{process}"}}{rest}'
    comma = "" if rest.startswith("{}") else ","
    return f'{name}{{{LABEL}="{process}"{comma}{rest[1:]}'


class LocalScrapes:
    """The endpoints of processes of this machine, by the value of the label."""

    def __init__(self, sockets: Mapping[str, Path]) -> None:
        self._sockets = sockets
        self._failing: set[str] = set()

    def texts(self, accept: str) -> dict[str, str]:
        """What each of them reports now, in the form that `accept` asks for. Blocks, for a bounded time."""
        with ThreadPoolExecutor(len(self._sockets)) as pool:
            return dict(self._answers(pool, accept))

    def _answers(self, pool: ThreadPoolExecutor, accept: str) -> Iterator[tuple[str, str]]:
        asked = {process: pool.submit(_scrape, path, accept) for process, path in self._sockets.items()}
        for process, answer in asked.items():
            try:
                yield process, answer.result()
            except (OSError, http.client.HTTPException) as problem:
                if process not in self._failing:
                    log.warning("metrics of process %s are left out: %s", process, problem or type(problem).__name__)
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
    """To a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))
