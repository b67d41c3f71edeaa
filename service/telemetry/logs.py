"""Formats of log lines, text and JSON. A line about a request has its request ID, and its trace ID if there is one.

A line may contain what clients send: its control characters are escaped, so that it stays one line.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

# IDs of the request of the running task; the protocol layer that names requests sets the request ID.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
TRACE_ID: ContextVar[str | None] = ContextVar("trace_id", default=None)

Fields = dict[str, str | bool | int | float]


def configure_logging(level: str, log_format: Literal["text", "json"]) -> None:
    """Write the log to stderr, unless the root logger already has a handler.

    Args:
        level: lowest level that is logged, in lower case.
        log_format: format of each line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """Formats a record as a line of text, with its named values at the end, as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if there is one."""
        named = "".join(f" {name}={_text(value)}" for name, value in _named(record).items())
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}{named}"
        lines = [line, *(self.formatException(record.exc_info).split("\n") if record.exc_info else ())]
        return "\n".join(map(_printable, lines))


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON: time, level, logger, message, named values and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_named(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _named(record: logging.LogRecord) -> Fields:
    """Return a record's named values: its `fields`, and the IDs of its request and trace."""
    named: Fields = dict(getattr(record, "fields", {}))
    if (request_id := REQUEST_ID.get()) is not None:
        named["request_id"] = request_id
    if (trace_id := TRACE_ID.get()) is not None:
        named["trace_id"] = trace_id
    return named


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
