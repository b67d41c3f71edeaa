"""What becomes of every classification is counted here, and here alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.domain import Classification
from service.errors import ClientGoneError, OverloadedError, ServiceError
from service.telemetry.metrics import Metrics
from service.telemetry.reports import current_report


@contextmanager
def counted(metrics: Metrics) -> Iterator[Callable[[Classification], None]]:
    """Count a classification in, and out by how the block ends; the report on its request gets the answer, too.

    Yields:
        What to tell of the answer.
    """
    report = current_report()

    def record(answer: Classification) -> None:
        metrics.answered(answer, None if report is None else report.exemplar)
        if report is not None:
            report.answers.append(answer)

    metrics.request_started()
    outcome, reason, is_missed = ServiceError.code, None, False  # of a bug, unless something better is known
    try:
        yield record
        outcome = "ok"
    except ServiceError as error:
        outcome = error.code
        reason = error.reason if isinstance(error, OverloadedError) else None
        is_missed = isinstance(error, ClientGoneError) and error.deadline_passed
        raise
    finally:
        metrics.request_finished(outcome, reason, is_missed=is_missed)
