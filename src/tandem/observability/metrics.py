"""The metrics interface of the services: counters and histograms are recorded on events, gauges read on demand.

Disabled, it does nothing and imports nothing; `otel_metrics.py` implements it. The metrics are defined in
`metric_catalog.py`.
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
    """The current value of a gauge."""

    name: str
    value: float
    attributes: Attributes = field(default_factory=dict)


Measure = Callable[[], Awaitable[Iterable[Reading]]]
"""Reads gauges; called on the service's event loop, once per scrape or push."""
MorePages = Mapping[str, Callable[[], bytes]]
"""Additional pages of the scrape endpoint, by path; called in a thread."""


class Metrics:
    """Disabled metrics; the base class of enabled ones."""

    is_on = False
    port = 0
    """Port of the scrape endpoint, once started; 0: there is none."""

    def count(self, name: str, amount: float = 1, attributes: Attributes = NONE) -> None:
        """Add to a counter."""

    def record(self, name: str, value: float, attributes: Attributes = NONE) -> None:
        """Add a value to a histogram."""

    def measure(self, read: Measure) -> None:
        """Register a function that reads gauges."""

    async def start(self, instance: str) -> None:
        """Open the scrape endpoint and start pushing; `instance` identifies this process.

        Raises:
            StartError: the port cannot be listened on.
        """

    async def stop(self) -> None:
        """Push a last time, within `otel_metrics.STOP_TIMEOUT_S`, and close. Idempotent; allowed without start."""


@dataclass(frozen=True, slots=True)
class Together:
    """Role of a process among several that are scraped at one endpoint."""

    path: Path | None = None
    """Socket at which the serving process scrapes this one; None: this is the serving process."""
    others: Mapping[str, Path] = field(default_factory=dict)
    """Sockets of the other processes, by label value; of the serving process only."""
    own_label: str = ""
    """Label value of the serving process itself."""


def open_metrics(
    config: ServiceConfig,
    emitter: Emitter,
    service: str,
    tls: Tls | None = None,
    pages: MorePages | None = None,
    together: Together | None = None,
) -> Metrics:
    """The metrics of a process, not started; disabled if neither scrape port nor collector is configured.

    Args:
        config: metrics_port and otlp_endpoint.
        emitter: selects rows of the catalog.
        service: its name, as OpenTelemetry's `service.name`.
        tls: certificate of the scrape endpoint; clients must present one of the same CA.
        pages: additional pages of the endpoint.
        together: set if several processes are scraped at one endpoint; None: only this one.
    """
    if config.metrics_port is None and config.otlp_endpoint is None:
        return Metrics()
    from tandem.observability.otel_metrics import OtelMetrics

    return OtelMetrics(config, emitter, service, tls, pages or {}, together or Together())
