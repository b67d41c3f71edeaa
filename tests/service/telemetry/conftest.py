"""Fixtures for the tests of telemetry: no test sees the request ID or the trace ID of an earlier one."""

from collections.abc import Iterator

import pytest

from service.telemetry.logs import REQUEST_ID, TRACE_ID


@pytest.fixture(autouse=True)
def about_no_request() -> Iterator[None]:
    request_token, trace_token = REQUEST_ID.set(None), TRACE_ID.set(None)
    yield
    TRACE_ID.reset(trace_token)
    REQUEST_ID.reset(request_token)
