from contextlib import suppress

import pytest

from service.errors import InvalidImageError, ModelError, OutOfMemoryError, OverloadedError
from service.health import FAILURES_IN_A_ROW, PAUSE_S, ServerFailures


def fail(failures: ServerFailures, error: Exception, times: int = 1) -> None:
    for _ in range(times):
        with suppress(type(error)), failures.counting():
            raise error


@pytest.mark.parametrize("error", [OutOfMemoryError("none left"), RuntimeError("a bug")])
def test_consecutive_server_failures_are_persistent_until_one_request_is_answered(error: Exception) -> None:
    failures = ServerFailures(clock=lambda: 5.0)
    fail(failures, error, FAILURES_IN_A_ROW - 1)
    assert not failures.is_persistent
    fail(failures, error)
    assert failures.is_persistent
    with failures.counting():
        pass
    assert not failures.is_persistent


@pytest.mark.parametrize("error", [InvalidImageError("x"), OverloadedError("x", "full", 1.0), ModelError("x")])
def test_client_overload_and_model_errors_neither_extend_nor_end_a_row_of_failures(error: Exception) -> None:
    failures = ServerFailures(clock=lambda: 5.0)
    fail(failures, error, 2 * FAILURES_IN_A_ROW)
    assert not failures.is_persistent
    fail(failures, OutOfMemoryError("x"), FAILURES_IN_A_ROW)
    fail(failures, error)
    assert failures.is_persistent


def test_failures_are_not_persistent_after_a_pause_until_the_next_one() -> None:
    now = 5.0
    failures = ServerFailures(clock=lambda: now)
    fail(failures, OutOfMemoryError("x"), FAILURES_IN_A_ROW)
    now += PAUSE_S
    assert not failures.is_persistent
    fail(failures, OutOfMemoryError("x"))
    assert failures.is_persistent
