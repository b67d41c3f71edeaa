import json
import logging
import sys
from collections.abc import Callable
from contextvars import copy_context
from datetime import datetime

import pytest

from service.telemetry.logs import REQUEST_ID, TRACE_ID, JsonFormatter, TextFormatter


def record(message: str = "all is well", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("service.http", logging.INFO, __file__, 1, "%s", (message,), None)
    made.__dict__["fields"] = fields
    return made


def about_a_request(format_it: Callable[[logging.LogRecord], str], made: logging.LogRecord) -> str:
    def run() -> str:
        REQUEST_ID.set("mine")
        TRACE_ID.set("4bf9")
        return format_it(made)

    return copy_context().run(run)


def failed(message: str) -> logging.LogRecord:
    made = record()
    try:
        raise ValueError(message)
    except ValueError:
        made.exc_info = sys.exc_info()
    return made


def test_a_text_line_ends_with_its_fields() -> None:
    made = record(gflops=0.5, deadline_met=True)
    line = about_a_request(TextFormatter().format, made)
    assert line.endswith(" INFO service.http: all is well gflops=0.5 deadline_met=true request_id=mine trace_id=4bf9")


def test_a_json_line_has_a_member_for_each_field() -> None:
    line = json.loads(about_a_request(JsonFormatter().format, record(gflops=0.5, deadline_met=True)))
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "info",
        "logger": "service.http",
        "message": "all is well",
        "gflops": 0.5,
        "deadline_met": True,
        "request_id": "mine",
        "trace_id": "4bf9",
    }


def test_a_line_outside_a_request_has_no_request_id() -> None:
    assert "request_id" not in TextFormatter().format(record())
    assert "request_id" not in json.loads(JsonFormatter().format(record()))


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_line_breaks_and_control_characters_never_reach_a_log_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record("no image\r\n2026 CRITICAL all is lost \x1b[31m"))
    assert "\n" not in line
    assert "\x1b" not in line
    assert "all is lost" in line


def test_a_traceback_is_logged_with_its_line() -> None:
    lines = TextFormatter().format(failed("red \x1b[31m")).split("\n")
    assert lines[0].endswith("all is well")
    assert lines[-1] == "ValueError: red \\x1b[31m"
    assert json.loads(JsonFormatter().format(failed("why")))["exception"].endswith("ValueError: why")
