import logging

import pytest

from service.telemetry.rate_limited_log import RateLimitedLog


def test_a_message_is_logged_at_once_and_later_with_the_number_of_suppressed_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    log = RateLimitedLog(logging.getLogger("test"), 10.0, lambda: now)
    for _ in range(3):
        log.warning("too many")
    log.warning("too slow")
    now = 10.0
    log.warning("too many")
    now = 30.0
    log.warning("too many")
    assert caplog.messages == ["too many", "too slow", "too many (2 more since the last such line)", "too many"]
