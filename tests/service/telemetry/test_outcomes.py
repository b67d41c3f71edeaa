import asyncio

import pytest
from prometheus_client import CollectorRegistry

from service.errors import (
    BodyTooLargeError,
    ClientGoneError,
    DeadlineError,
    InvalidParameterError,
    NotReadyError,
    OverloadedError,
)
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counted


@pytest.mark.parametrize(
    ("error", "outcome", "dropped", "missed"),
    [
        (None, "ok", None, 0),
        (InvalidParameterError("top_k"), "invalid_parameter", None, 0),
        (BodyTooLargeError("large"), "body_too_large", None, 0),
        (NotReadyError("warming up"), "not_ready", "not_ready", 0),
        (OverloadedError("later", "backlog", 1.0), "overloaded", "backlog", 1),
        (OverloadedError("used up", "key", 1.0), "overloaded", "key", 0),
        (OverloadedError("too many", "address", 1.0), "overloaded", "address", 0),
        (DeadlineError("late"), "deadline_exceeded", "expired", 1),
        (ClientGoneError("left"), "client_gone", None, 0),
        (ClientGoneError("left", deadline_passed=True), "client_gone", None, 1),
        (ZeroDivisionError(), "internal_error", None, 1),
        (asyncio.CancelledError(), "internal_error", None, 1),  # cancelled at the end of the drain
    ],
)
def test_every_request_is_counted_once_by_its_outcome(
    error: BaseException | None, outcome: str, dropped: str | None, missed: int
) -> None:
    registry = CollectorRegistry()

    def read(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"supervit_{name}", labels) or 0.0

    ended: list[BaseException] = []
    try:
        with counted(Metrics(registry)):
            assert read("requests_in_flight") == 1
            if error is not None:
                raise error
    except BaseException as raised:
        ended.append(raised)
    assert ended == ([] if error is None else [error])
    assert read("requests_in_flight") == 0
    assert read("requests_total", outcome=outcome) == 1
    assert read("deadlines_total", result="missed") == missed
    assert dropped is None or read("dropped_requests_total", reason=dropped) == 1
