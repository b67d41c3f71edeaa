"""Retries, by a clock that moves only while the client sleeps or the server works."""

import io
import json
import math
import ssl
from dataclasses import dataclass, field

import httpx
import pytest

from service.client import Client
from service.errors import (
    BudgetTooSmallError,
    ConnectionFailedError,
    DeadlineError,
    InvalidImageError,
    InvalidParameterError,
    NotReadyError,
    OverloadedError,
    ResponseTimeoutError,
    ServiceError,
    UnexpectedAnswerError,
    UnreachableError,
)
from service.retries import bearer
from tests.service.wire_answers import ANSWER, refusal

Script = list[httpx.Response | type[httpx.HTTPError]]
OVERLOADED = refusal(429, "overloaded", reason="backlog", retry_after_s=0.1)
ANSWERED = httpx.Response(200, json=ANSWER)


@dataclass
class ScriptedServer:
    """A server that gives its answers one by one, each after `takes_s`, and records the requests."""

    script: Script
    takes_s: float = 0.0
    oversleeps_s: float = 0.0
    now: float = 1000.0
    budgets_ms: list[float] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    slept_s: list[float] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.now += self.takes_s
        self.budgets_ms.append(float(request.url.params.get("budget_ms", "nan")))
        self.bodies.append(request.content)
        answer = self.script[min(len(self.bodies), len(self.script)) - 1]
        if isinstance(answer, type):
            raise answer("")
        return answer

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now += seconds + self.oversleeps_s

    def client(self, draw: float = 0.0, timeout_s: float = 60, max_retries: int = 2) -> Client:
        transport = httpx.MockTransport(self)
        return Client(
            "http://server",
            transport=transport,
            clock=lambda: self.now,
            sleep=self.sleep,
            draw=lambda: draw,
            timeout_s=timeout_s,
            max_retries=max_retries,
        )


def test_an_overloaded_server_is_retried_after_the_time_that_it_asks_for() -> None:
    server = ScriptedServer([OVERLOADED, ANSWERED])
    assert server.client().classify(b"image", budget_ms=1000).predictions[0].label == "dalmatian"
    assert server.slept_s == [pytest.approx(0.1)]


def test_each_retry_sends_what_is_left_of_the_latency_budget() -> None:
    server = ScriptedServer([OVERLOADED, OVERLOADED, ANSWERED], takes_s=0.05)
    server.client().classify(b"image", budget_ms=1000)
    assert server.budgets_ms == [1000, pytest.approx(850), pytest.approx(700)]


def test_a_retry_sends_the_whole_file_again() -> None:
    server = ScriptedServer([OVERLOADED, ANSWERED])
    server.client().classify(io.BytesIO(b"image"))
    assert server.bodies == [b"image", b"image"]


def test_no_retry_is_made_that_could_not_begin_before_the_deadline() -> None:
    server = ScriptedServer([OVERLOADED, ANSWERED])
    with pytest.raises(OverloadedError) as caught:
        server.client().classify(b"image", budget_ms=100)
    assert caught.value.retry_after_s == 0.1
    assert server.slept_s == []


def test_a_pause_that_outlasts_the_budget_ends_in_the_last_error() -> None:
    server = ScriptedServer([OVERLOADED, ANSWERED], oversleeps_s=1.0)
    with pytest.raises(OverloadedError):
        server.client().classify(b"image", budget_ms=500)
    assert len(server.bodies) == 1


def test_without_a_budget_the_timeout_bounds_the_retries() -> None:
    server = ScriptedServer([refusal(503, "not_ready", headers={"Retry-After": "4"})])
    with pytest.raises(NotReadyError):
        server.client(timeout_s=10, max_retries=99).classify(b"image")
    assert server.slept_s == [4, 4]
    assert all(math.isnan(budget) for budget in server.budgets_ms)


def test_no_more_retries_are_made_than_allowed() -> None:
    server = ScriptedServer([OVERLOADED])
    with pytest.raises(OverloadedError):
        server.client(max_retries=3).classify(b"image")
    assert len(server.bodies) == 1 + 3


def test_the_random_part_of_the_pauses_doubles_with_each_retry() -> None:
    server = ScriptedServer([OVERLOADED, OVERLOADED, OVERLOADED, ANSWERED])
    server.client(draw=0.5, max_retries=3).classify(b"image")
    assert server.slept_s == [pytest.approx(0.1 + 0.05), pytest.approx(0.1 + 0.1), pytest.approx(0.1 + 0.2)]


@pytest.mark.parametrize("failure", [httpx.ConnectError, httpx.ConnectTimeout])
def test_an_unreachable_server_is_retried(failure: type[httpx.HTTPError]) -> None:
    server = ScriptedServer([failure, ANSWERED])
    server.client(draw=0.5).classify(b"image")
    assert server.slept_s == [pytest.approx(0.05)]
    with pytest.raises(UnreachableError, match="cannot connect to http://server"):
        ScriptedServer([failure]).client().classify(b"image")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(504, "deadline_exceeded"), DeadlineError),
        (refusal(422, "invalid_image"), InvalidImageError),
        (refusal(422, "budget_too_small", smallest=1), BudgetTooSmallError),
        (refusal(500, "internal_error"), ServiceError),
        (refusal(503, "not_ready"), NotReadyError),  # without a time to retry
        (httpx.Response(502, text="<html>"), UnexpectedAnswerError),
        (
            httpx.Response(503, text="<html>", headers={"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}),
            UnexpectedAnswerError,
        ),
        (httpx.ReadTimeout, ResponseTimeoutError),
        (httpx.WriteError, ConnectionFailedError),  # the server may be working on the request
        (httpx.RemoteProtocolError, ConnectionFailedError),
    ],
)
def test_errors_that_a_retry_would_not_mend_are_not_retried(
    answer: httpx.Response | type[httpx.HTTPError], kind: type[ServiceError]
) -> None:
    server = ScriptedServer([answer])
    with pytest.raises(kind) as caught:
        server.client().classify(b"image")
    assert type(caught.value) is kind
    assert server.slept_s == []


def tls_error(error: ssl.SSLError, **attributes: str) -> ssl.SSLError:
    """Return an error with the attributes that only OpenSSL sets."""
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (
            tls_error(ssl.SSLCertVerificationError(), reason="FAILED", verify_message="self-signed"),
            ": its certificate .*self-signed",
        ),
        (tls_error(ssl.SSLError(), reason="WRONG_VERSION_NUMBER"), ": it speaks no TLS .*WRONG_VERSION"),
        (OSError("connection refused"), "$"),
    ],
)
def test_a_failed_connection_says_whether_tls_is_the_reason(cause: OSError, told: str) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        try:
            raise cause
        except OSError as error:
            raise httpx.ConnectError("") from error

    with (
        Client("https://server", transport=httpx.MockTransport(fail), max_retries=0) as client,
        pytest.raises(UnreachableError, match=f"^cannot connect to https://server{told}") as raised,
    ):
        client.classify(b"image")
    assert ("SSL_CERT_FILE" in str(raised.value)) == ("certificate" in told)


def test_a_proxy_that_asks_for_a_retry_gets_one() -> None:
    busy = httpx.Response(503, text="<html>", headers={"Retry-After": "2"})
    server = ScriptedServer([busy, ANSWERED])
    server.client().classify(b"image")
    assert server.slept_s == [2]


def test_a_retry_time_that_is_nan_is_not_waited_for() -> None:
    answer = refusal(429, "overloaded", reason="backlog", retry_after_s=float("nan"))
    server = ScriptedServer([answer])
    with pytest.raises(OverloadedError):
        server.client().classify(b"image")
    assert server.slept_s == []


@pytest.mark.parametrize("waits", [refusal(503, "not_ready", headers={"Retry-After": "1"}), httpx.ConnectError])
def test_a_starting_server_is_polled_until_it_is_ready(waits: httpx.Response | type[httpx.HTTPError]) -> None:
    ready = httpx.Response(200, json={"status": "ready", "profile_measured": 0.25})
    server = ScriptedServer([waits, waits, waits, waits, ready])
    assert server.client(max_retries=0).wait_until_ready().profile_measured == 0.25
    assert sum(server.slept_s) < 1


def test_a_server_that_is_not_ready_in_time_ends_in_its_last_error() -> None:
    server = ScriptedServer([refusal(503, "not_ready", headers={"Retry-After": "1"})])
    with pytest.raises(NotReadyError):
        server.client().wait_until_ready(within_s=3)
    assert 2.5 < sum(server.slept_s) < 3


def test_an_error_with_an_unknown_code_keeps_its_code_message_and_details() -> None:
    server = ScriptedServer([refusal(418, "teapot", message="short", self="stout")])
    with pytest.raises(ServiceError, match="it says so") as caught:
        server.client().classify(b"image")
    assert caught.value.code == "teapot"
    assert caught.value.details == {"message": "short", "self": "stout"}


def test_an_overload_error_of_another_server_version_is_still_understood() -> None:
    more = refusal(429, "overloaded", reason="moon", retry_after_s=1e9, phase="full")
    with pytest.raises(OverloadedError) as caught:
        ScriptedServer([more]).client().classify(b"image")
    assert caught.value.details == {"reason": "moon", "retry_after_s": 1e9, "phase": "full"}
    with pytest.raises(ServiceError) as plain:
        ScriptedServer([refusal(429, "overloaded", retry_after_s="soon")]).client().classify(b"image")
    assert plain.value.code == "overloaded"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, json.dumps({"predictions": 1}).encode()]
)
def test_an_answer_that_is_not_of_a_supervit_server_is_recognised(content: bytes) -> None:
    answer = httpx.Response(200, content=content)
    with pytest.raises(UnexpectedAnswerError, match=r"^http://server did not answer like a SuperViT server$"):
        ScriptedServer([answer]).client().classify(b"image")


def test_unknown_fields_of_a_newer_server_are_ignored() -> None:
    newer = ANSWER | {"mood": "fine", "model": {**ANSWER["model"], "colour": "red"}}
    server = ScriptedServer([httpx.Response(200, json=newer)])
    assert server.client().classify(b"image").model.name == "small"


def test_a_try_of_a_starting_server_takes_no_longer_than_what_is_left() -> None:
    timeouts: list[float] = []

    def silent(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"]["read"])
        raise httpx.ReadTimeout("", request=request)

    client = Client("http://server", transport=httpx.MockTransport(silent), timeout_s=60, clock=lambda: 1000.0)
    with pytest.raises(ResponseTimeoutError):
        client.wait_until_ready(within_s=0.5)
    with pytest.raises(ResponseTimeoutError):
        client.wait_until_ready(within_s=600)  # no longer than the client waits for any answer
    with pytest.raises(ResponseTimeoutError):
        client.subnetworks()
    assert timeouts == [0.5, 60, 60]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_before_a_starting_server_is_polled_as_well(status: int) -> None:
    ready = httpx.Response(200, json={"status": "ready", "profile_measured": 0.25})
    server = ScriptedServer([httpx.Response(status, text="<html>bad gateway</html>"), ready])
    assert server.client(max_retries=0).wait_until_ready().profile_measured == 0.25


def test_a_key_is_sent_without_the_white_space_around_it_and_refused_if_no_header_carries_it() -> None:
    assert bearer(" secret\n") == {"Authorization": "Bearer secret"}
    for key in ("two words", "schlüssel", ""):
        with pytest.raises(InvalidParameterError, match="visible ASCII characters"):
            bearer(key)
