"""Counts every classification and its outcome; only `http/early_rejection` counts its own rejections."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.domain import ApiKey, Classification
from service.errors import ClientGoneError, OverloadedError, ServiceError
from service.telemetry.inference_statistics import OK
from service.telemetry.metrics import Metrics
from service.telemetry.reports import current_report


@contextmanager
def counting_failures(metrics: Metrics, key: ApiKey | None = None) -> Iterator[None]:
    """Count a classification that fails in this block, before `counted` begins for it; arguments as there."""
    try:
        yield
    except ServiceError:
        with counted(metrics, key):
            raise


@contextmanager
def counted(metrics: Metrics, key: ApiKey | None = None) -> Iterator[Callable[[Classification], None]]:
    """Count a classification that starts, and its outcome when the block ends.

    Args:
        metrics: metrics in which the classification is counted.
        key: API key of the request.

    Yields:
        A function that records the answer in the metrics and in the report on the request.
    """
    report = current_report()
    metrics.request_started()
    started_at = time.monotonic()
    outcome, reason, is_missed = ServiceError.code, None, False  # that of a bug, unless the block ends otherwise

    def record(answer: Classification) -> None:
        metrics.answered(answer, None if report is None else report.exemplar)
        if report is not None:
            report.answers.append(answer)

    try:
        yield record
        outcome = OK
    except ServiceError as error:
        outcome = error.code
        reason = error.reason if isinstance(error, OverloadedError) else None
        is_missed = isinstance(error, ClientGoneError) and error.deadline_passed
        raise
    finally:
        metrics.request_finished(outcome, reason, is_missed=is_missed, took_s=time.monotonic() - started_at)
        if key is not None:
            metrics.keys.finished(key.name, outcome)
