"""Logs: one event per line on standard error, as JSON or as text.

Every line logged while handling a request carries its ids, and one line summarises each request when it ends. Prompts,
token ids and secrets are never logged; of an invalid value only the name of its field is.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from tandem.errors import ParserFailed
from tandem.observability.request_trace import FAILED, FINISHED, REFUSED, LegTrace, RequestTrace

FIELDS = "tandem"
"""Attribute of a log record that holds additional fields: `log.info(..., extra={FIELDS: {...}})`."""
PLAIN = "%(asctime)s %(levelname)s %(name)s %(message)s"
requests_log, legs_log = logging.getLogger("tandem.request"), logging.getLogger("tandem.leg")

about: ContextVar[RequestTrace | LegTrace | None] = ContextVar("about", default=None)
"""The request or leg being handled. Never reset: every call runs in its own task and context."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line of JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **ids_of(about.get()),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class _Numbered(logging.Filter):
    """Adds the number of this process to every record."""

    def __init__(self, process: int) -> None:
        super().__init__()
        self._fields = {"process": process}

    def filter(self, record: logging.LogRecord) -> bool:
        setattr(record, FIELDS, {**self._fields, **getattr(record, FIELDS, {})})
        return True


class TextFormatter(logging.Formatter):
    """Readable lines; the fields follow the message in brackets."""

    def __init__(self) -> None:
        super().__init__(PLAIN)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- the library's name
        """The line without the traceback."""
        fields = {**ids_of(about.get()), **getattr(record, FIELDS, {})}
        suffix = " ".join(f"{key}={value}" for key, value in fields.items())
        return f"{super().formatMessage(record)}{f' [{suffix}]' if suffix else ''}"


def ids_of(trace: RequestTrace | LegTrace | None) -> dict[str, str]:
    """Ids by which a request is found in logs and traces."""
    if trace is None:
        return {}
    ids = {"request_id": trace.request_id} if trace.request_id else {}
    return ids if trace.span_context is None else {**ids, "trace_id": trace.span_context.trace_hex}


def set_up(level: str, log_format: str, service: str, process: int | None = None) -> None:
    """Configure the root logger; format `auto` is text on a terminal and JSON elsewhere.

    `process`: number of this process, added to every line where several processes share a log file.
    """
    handler = logging.StreamHandler(sys.stderr)
    if process is not None:
        handler.addFilter(_Numbered(process))
    handler.setFormatter(TextFormatter() if is_text(log_format) else JsonFormatter(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Neither format shows these attributes, and collecting them is a third of the cost of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # documented way to skip the caller lookup


def is_text(log_format: str) -> bool:
    """Whether the effective log format is text."""
    return log_format == "text" or (log_format == "auto" and sys.stderr.isatty())


def log_request(trace: RequestTrace) -> None:
    """Log the summary of an ended request."""
    if requests_log.isEnabledFor(logging.INFO):
        requests_log.info("%s %s", trace.operation, _ending(trace), extra={FIELDS: request_fields(trace)})


def log_leg(trace: LegTrace) -> None:
    """Log the summary of an ended leg. Only failures are warnings: the frontend logs every request already."""
    level = logging.WARNING if trace.outcome == FAILED else logging.DEBUG
    if legs_log.isEnabledFor(level):
        legs_log.log(level, "%s leg %s", trace.role, _ending(trace), extra={FIELDS: leg_fields(trace)})


def request_fields(trace: RequestTrace) -> Mapping[str, Any]:
    """Log fields of a request."""
    last = trace.attempts[-1] if trace.attempts else None
    workers = () if last is None else (last.prefill_worker, last.decode_worker)
    fields: dict[str, Any] = {
        **ids_of(trace),
        "call_id": trace.call_id or None,
        "operation": trace.operation,
        "model": trace.model,
        "tenant": trace.tenant or None,
        "outcome": trace.outcome,
        "reason": trace.reason,
        "field": trace.field or None,
        "error": _error(trace),
        "prompt_tokens": trace.prompt_tokens,
        "completion_tokens": trace.completion_tokens or trace.token_count,
        "cached_tokens": trace.cached_tokens if trace.outcome == FINISHED else None,
        "ttft_ms": _ms(trace.ttft_s),
        "duration_ms": _ms(None if trace.end_s is None else trace.end_s - trace.begin_s),
        "attempts": len(trace.attempts),
        "workers": [worker.worker_id for worker in workers if worker is not None],
        "room": last.room if last is not None and last.room else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def leg_fields(trace: LegTrace) -> Mapping[str, Any]:
    """Log fields of a leg."""
    fields: dict[str, Any] = {
        **ids_of(trace),
        "attempt": trace.attempt,
        "role": trace.role,
        "outcome": trace.outcome,
        "reason": trace.reason,
        "field": trace.field or None,
        "error": _error(trace),
        "prompt_tokens": trace.prompt_tokens,
        "completion_tokens": trace.token_count,
        "duration_ms": _ms(None if trace.end_s is None else trace.end_s - trace.begin_s),
        "room": trace.room or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _ending(trace: RequestTrace | LegTrace) -> str:
    """The outcome; of a refused or failed one also why, and which field was wrong."""
    if trace.outcome not in (FAILED, REFUSED):
        return trace.outcome
    return f"{trace.outcome}: {trace.reason}{f', field {trace.field}' if trace.field else ''}"


def _error(trace: RequestTrace | LegTrace) -> str | None:
    """The sentence of an error that the request did not cause. A parser's may quote the generated text: not logged."""
    if trace.outcome not in (FAILED, REFUSED) or trace.field or trace.reason == ParserFailed.reason:
        return None
    return trace.message or None


def _ms(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s * 1000, 2)
