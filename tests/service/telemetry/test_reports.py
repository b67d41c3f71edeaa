import logging
import sys
from collections.abc import Iterator

import pytest

from service.errors import InvalidParameterError
from service.telemetry.reports import Reporter, find_tracer
from service.telemetry.stages import Outcome, fields_of
from service.telemetry.tracing import RequestTracer
from tests.service.telemetry.answers import ARRIVED_AT, ONE_LOOK

OK = Outcome("POST /classify 200", "POST /classify", {})
LATE = Outcome("POST /classify 504", "POST /classify", {}, "deadline_exceeded", is_failure=True)
REJECTED = Outcome("POST /classify 429", "POST /classify", {}, "overloaded")
HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def tracer() -> Iterator[RequestTracer]:
    made = RequestTracer([])
    yield made
    made.close(within_s=1.0)


def reporter(*, logs_requests: bool = False) -> Reporter:
    return Reporter(logs_requests=logs_requests, clock=lambda: ARRIVED_AT + 0.5)


def test_each_request_is_logged_with_the_fields_of_its_answer_or_its_error(log: pytest.LogCaptureFixture) -> None:
    reports = reporter(logs_requests=True)
    report = reports.begin("POST", [], ARRIVED_AT)
    report.answers.append(ONE_LOOK)
    reports.end(report, lambda: OK)
    reports.end(reports.begin("POST", [], ARRIVED_AT), lambda: LATE)
    assert log.messages == ["POST /classify 200", "POST /classify 504"]
    answered, late = (record.__dict__["fields"] for record in log.records)
    assert answered == {"duration_ms": 500.0, **fields_of([ONE_LOOK])}
    assert late == {"duration_ms": 500.0, "error": "deadline_exceeded"}


def test_a_request_is_not_described_unless_logs_or_traces_are_enabled(log: pytest.LogCaptureFixture) -> None:
    def describe() -> Outcome:
        raise AssertionError("it was")

    reports = reporter()
    reports.end(reports.begin("POST", [], ARRIVED_AT), describe)
    reports.rejected()
    assert log.messages == []


def test_rejections_are_logged_at_a_limited_rate(log: pytest.LogCaptureFixture) -> None:
    reports = reporter(logs_requests=True)
    for _ in range(3):
        reports.end(reports.begin("POST", [], ARRIVED_AT), lambda: REJECTED)
        reports.rejected()
    assert log.messages == ["a request was rejected for overload"]


def test_a_traced_request_has_an_exemplar_and_an_untraced_one_has_none(tracer: RequestTracer) -> None:
    reports = Reporter(tracer)
    traced = reports.begin("POST", [], None)
    assert traced.trace is not None
    assert traced.exemplar == {"trace_id": traced.trace.trace_id}
    looked = reports.begin("GET", [], None, is_traced=False)
    assert (looked.trace, looked.exemplar) == (None, None)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SERVICE_NAME": "alone"},
        {**HERE, "OTEL_SDK_DISABLED": "True"},
        {**HERE, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_no_tracer_is_created_unless_the_variables_enable_traces(variables: dict[str, str]) -> None:
    assert find_tracer(variables) is None


@pytest.mark.parametrize(
    "variables", [HERE, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, {"OTEL_TRACES_EXPORTER": "otlp"}]
)
def test_an_endpoint_or_an_exporter_enables_traces(variables: dict[str, str]) -> None:
    tracer = find_tracer(variables)
    assert tracer is not None
    tracer.close(within_s=5.0)


def test_a_missing_otel_extra_is_named_in_the_log(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "service.telemetry.tracing", None)
    assert find_tracer(HERE) is None
    assert "pip install '.[otel]'" in log.text


def test_a_value_that_opentelemetry_rejects_raises_an_invalid_parameter_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(InvalidParameterError, match="OTEL_ variable"):
        find_tracer(HERE)
