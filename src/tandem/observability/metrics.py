"""The metrics interface of the services: counters and histograms are recorded when something happens, gauges when read.

Switched off, it does nothing and imports nothing; `otel_metrics.py` implements it. `metric_catalog.py` alone says which
metrics there are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tandem.config import ServiceConfig
from tandem.observability.metric_catalog import Emitter
from tandem.tls.paths import Tls

Attributes = Mapping[str, str]
NONE: Attributes = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Reading:
    """What a gauge shows now."""

    name: str
    value: float
    attributes: Attributes = field(default_factory=dict)


Measure = Callable[[], Awaitable[Iterable[Reading]]]
"""Reads gauges. Runs on the service's event loop, when somebody asks."""
MorePages = Mapping[str, Callable[[], bytes]]
"""What the scrape endpoint answers beside the metrics, by path; called in a thread."""


class Metrics:
    """Metrics that are off."""

    is_on = False
    port = 0
    """Of the scrape endpoint, once started; 0: there is none."""

    def count(self, name: str, amount: float = 1, attributes: Attributes = NONE) -> None:
        """Add to a counter."""

    def record(self, name: str, value: float, attributes: Attributes = NONE) -> None:
        """Add a value to a histogram."""

    def measure(self, read: Measure) -> None:
        """Have gauges read by this from now on."""

    async def start(self, instance: str) -> None:
        """Open the scrape endpoint and begin to push; `instance` names this process.

        Raises:
            StartError: the port cannot be listened on.
        """

    async def stop(self) -> None:
        """Push what is left, within a bound, and close. May be called twice, and without a start."""


@dataclass(frozen=True, slots=True)
class Together:
    """Where a process stands among those that are scraped together."""

    path: Path | None = None
    """Of a socket, where it is scraped by the one that answers for all of them; None: it is that one."""
    others: Mapping[str, Path] = field(default_factory=dict)
    """Those sockets, by what tells the processes apart."""
    own_label: str = ""
    """The same of the one that answers."""


def open_metrics(
    config: ServiceConfig,
    emitter: Emitter,
    service: str,
    tls: Tls | None = None,
    pages: MorePages | None = None,
    together: Together | None = None,
) -> Metrics:
    """The metrics of a process, not started; off when nobody would read them.

    Args:
        config: says who reads them.
        emitter: which rows of the table it has.
        service: its name, as OpenTelemetry's `service.name`.
        tls: what the scrape endpoint proves itself with, and asks of whoever scrapes.
        pages: what the endpoint answers besides.
        together: where several processes are scraped at one endpoint; None: this one is alone.
    """
    if config.metrics_port is None and config.otlp_endpoint is None:
        return Metrics()
    from tandem.observability.otel_metrics import OtelMetrics

    return OtelMetrics(config, emitter, service, tls, pages or {}, together or Together())
