"""The lines of the log, as text or as JSON. A line that is about a request names it, and its trace where there is one.

What clients send may stand in a line: control characters in it are escaped, so that it stays one line.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

# Of the request that the task at work is about, set by the layer of the wire that names it.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
TRACE_ID: ContextVar[str | None] = ContextVar("trace_id", default=None)

Fields = dict[str, str | bool | int | float]


def configure_logging(level: str, log_format: Literal["text", "json"]) -> None:
    """Write the log to stderr, unless something else takes it already.

    Args:
        level: least serious lines, in lower case.
        log_format: of each.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """Makes a line of text of a record; what is told by name comes last, as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and below it the traceback, where there is one."""
        named = "".join(f" {name}={_text(value)}" for name, value in _named(record).items())
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}{named}"
        lines = [line, *(self.formatException(record.exc_info).split("\n") if record.exc_info else ())]
        return "\n".join(map(_printable, lines))


class JsonFormatter(logging.Formatter):
    """Makes a line of JSON of a record: time, level, logger and message, what is told by name, and the exception."""

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
    """Return what a record tells by name: its `fields`, and what request it is about."""
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
