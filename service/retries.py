"""What a client sends, when it retries, and what the answers mean. Sends nothing itself and never sleeps."""

import json
import math
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Generic, TypedDict, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.errors import (
    ConnectionFailedError,
    InvalidParameterError,
    OverloadedError,
    ResponseTimeoutError,
    ServiceError,
    UnexpectedAnswerError,
    UnreachableError,
    rebuild_error,
)
from service.http.schemas import ClassifyAnswer, DecideAnswer, ErrorBody, ExplainAnswer, FeedbackAnswer, ReadyAnswer

# Most that the first retry waits beyond what the server asks for; each further retry waits up to twice as long.
BACKOFF_S = 0.1
POLL_S = 0.05
LEAST_TIMEOUT_S = 0.05
REQUEST_ID = "X-Request-ID"
# Answers of a proxy whose server does not answer yet.
NOT_YET = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)

Answer = TypeVar("Answer", bound=BaseModel)
Clock = Callable[[], float]
Reply = httpx.Response | httpx.HTTPError


class DecideOptions(TypedDict, total=False):
    """What a decision depends on; the server decides options that are missing or None.

    Attributes:
        budget_gflops: most that the answer may cost, in 1e9 multiply-accumulates.
        budget_ms: time from the call, retries included, within which the answer is wanted.
        priority: 0 is normal; lower ones, down to -10, may be rejected or shed first.
        patch_grid: with keep_rate: a sub-network by name.
        keep_rate: with patch_grid: a sub-network by name.
    """

    budget_gflops: float | None
    budget_ms: float | None
    priority: int | None
    patch_grid: int | None
    keep_rate: float | None


class ClassifyOptions(DecideOptions, total=False):
    """The options of a request.

    Attributes:
        min_confidence: probability of the answer, 0..1, below which the image is looked at again.
        top_k: number of predictions to return.
        request_id: name of the request in the server's log, and for `feedback`.
    """

    min_confidence: float | None
    top_k: int | None
    request_id: str | None


def bearer(api_key: str | None) -> dict[str, str]:
    """Return the headers that carry an API key, without the white space around it that files of secrets end in.

    Raises:
        InvalidParameterError: the key has characters that no header carries.
    """
    if api_key is None:
        return {}
    key = api_key.strip()
    if not re.fullmatch("[!-~]+", key):
        raise InvalidParameterError("the API key must consist of visible ASCII characters", parameter="api_key")
    return {"Authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request to send."""

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, image: bytes | None, options: DecideOptions | ClassifyOptions) -> "Call":
        """Create the call that sends an image, or none, with its options."""
        query: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        request_id = query.pop("request_id", None)
        return cls("POST", path, query, image, {} if request_id is None else {REQUEST_ID: request_id})


@dataclass(frozen=True, slots=True)
class Pause:
    """The time to wait before the next try."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often a request is tried, by which clock, and what draws its random pauses."""

    timeout_s: float
    max_retries: float
    clock: Clock
    draw: Clock


class Retries(Generic[Answer]):
    """One request, tried until it is answered, finally refused or out of time. Neither sends nor sleeps."""

    def __init__(
        self,
        policy: RetryPolicy,
        kind: type[Answer],
        call: Call,
        *,
        budget_ms: float | None = None,
        poll_s: float | None = None,
    ) -> None:
        """Start a request; its time runs from now.

        Args:
            policy: how long and how often to try.
            kind: type of the answer.
            call: the request to send.
            budget_ms: time for all tries together; a retry tells the server what is left of it.
            poll_s: pause before a server that invites another try is asked again; by default what it asks for, and a
                random backoff.
        """
        self._retry_policy, self._kind, self._call, self._poll_s = policy, kind, call, poll_s
        self._budget_ms, self._errors, self._most_s = budget_ms, list[ServiceError](), policy.timeout_s
        self._ends_at = policy.clock() + (policy.timeout_s if budget_ms is None else budget_ms / 1000)

    @classmethod
    def of_classify(cls, policy: RetryPolicy, image: bytes, options: ClassifyOptions) -> "Retries[ClassifyAnswer]":
        """Create the tries of a classification."""
        return Retries(policy, ClassifyAnswer, Call.of("/classify", image, options), budget_ms=options.get("budget_ms"))

    @classmethod
    def of_explain(cls, policy: RetryPolicy, image: bytes, options: ClassifyOptions) -> "Retries[ExplainAnswer]":
        """Create the tries of a classification with an explanation."""
        call = Call.of("/explain", image, options)
        return Retries(policy, ExplainAnswer, call, budget_ms=options.get("budget_ms"))

    @classmethod
    def of_decide(cls, policy: RetryPolicy, options: DecideOptions) -> "Retries[DecideAnswer]":
        """Create the tries of a decision without an image."""
        return Retries(policy, DecideAnswer, Call.of("/decide", None, options))

    @classmethod
    def of_feedback(
        cls, policy: RetryPolicy, request_id: str, label: str | None, index: int | None, image: int
    ) -> "Retries[FeedbackAnswer]":
        """Create the tries of a report on an earlier answer."""
        named = {"label": label, "index": index, "image": image}
        report = {"request_id": request_id} | {name: value for name, value in named.items() if value is not None}
        call = Call("POST", "/feedback", {}, json.dumps(report).encode(), {"Content-Type": "application/json"})
        return Retries(policy, FeedbackAnswer, call)

    @classmethod
    def of_readiness(cls, policy: RetryPolicy, within_s: float) -> "Retries[ReadyAnswer]":
        """Create the tries that poll a server until it is ready."""
        waiting = RetryPolicy(within_s, math.inf, policy.clock, policy.draw)
        tries = Retries(waiting, ReadyAnswer, Call("GET", "/health/ready"), poll_s=POLL_S)
        tries._most_s = policy.timeout_s
        return tries

    def next_call(self) -> Call:
        """Return what to send now; a retry gets what is left of the budget."""
        if not self._errors or self._budget_ms is None:
            return self._call
        left_ms = 1000 * (self._ends_at - self._retry_policy.clock())
        if left_ms <= 0:  # the pause took longer than planned
            raise self._errors[-1]
        return replace(self._call, query={**self._call.query, "budget_ms": left_ms})

    @property
    def timeout_s(self) -> float | None:
        """Return how long a try of a server that starts may take; None where the client's own timeout suffices."""
        if self._poll_s is None:
            return None
        left_s = self._ends_at - self._retry_policy.clock()
        return max(LEAST_TIMEOUT_S, min(self._most_s, left_s))

    def judge(self, reply: Reply) -> Answer | Pause:
        """Return the answer, or how long to wait before the next try; raise the error if there is to be none."""
        try:
            return _read(reply, self._kind)
        except ServiceError as error:
            pause_s = self._pause_s(reply, error)
            if pause_s is None or len(self._errors) >= self._retry_policy.max_retries:
                raise
            if not self._retry_policy.clock() + pause_s < self._ends_at:  # in this form NaN is never waited for
                raise
            self._errors.append(error)
        return Pause(pause_s)

    def _pause_s(self, reply: Reply, error: ServiceError) -> float | None:
        asked_s = _retry_after_s(reply, error)
        if self._poll_s is not None and (asked_s is not None or _is_not_yet(reply)):
            return self._poll_s
        if asked_s is None:
            return None
        return asked_s + self._retry_policy.draw() * BACKOFF_S * 2.0 ** len(self._errors)


def _is_not_yet(reply: Reply) -> bool:
    """Return whether what answers, such as a proxy, says that the server behind it does not answer yet."""
    return not isinstance(reply, httpx.HTTPError) and reply.status_code in NOT_YET


def _retry_after_s(reply: Reply, error: ServiceError) -> float | None:
    """Return when another try is invited; None where it would be in vain, or the request may be under way."""
    if isinstance(reply, httpx.HTTPError):
        return 0.0 if isinstance(reply, httpx.ConnectError | httpx.ConnectTimeout) else None
    if reply.status_code not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return None
    if isinstance(error, OverloadedError):  # more precise than the header, which has whole seconds
        return error.retry_after_s
    header = reply.headers.get("Retry-After", "")
    return float(header) if header.isdecimal() else None


def _read(reply: Reply, kind: type[Answer]) -> Answer:
    """Parse an answer of this kind, or raise the error that the reply describes."""
    if isinstance(reply, httpx.HTTPError):
        raise _broken(reply) from reply
    try:
        if reply.status_code == HTTPStatus.OK:
            return kind.model_validate_json(reply.content)
        problem = ErrorBody.model_validate_json(reply.content).error
    except ValidationError as error:
        what = f"{_site(reply.request)} did not answer like a SuperViT server"
        raise UnexpectedAnswerError(what, status=reply.status_code) from error
    raise rebuild_error(problem.code, problem.message, problem.details)


def _broken(error: httpx.HTTPError) -> ServiceError:
    site = _site(error.request)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return UnreachableError(f"cannot connect to {site}{tls_problem(error)}")
    if isinstance(error, httpx.TimeoutException):
        return ResponseTimeoutError(f"{site} did not answer in time")
    return ConnectionFailedError(f"{site} closed the connection before answering")


def tls_problem(error: BaseException | None) -> str:
    """Say what is wrong with a server's TLS, where that is why a connection failed, to follow a message about it."""
    found = None
    while error is not None:
        if isinstance(error, ssl.SSLError) and hasattr(error, "reason"):  # aiohttp derives errors that lack it
            found = error
        error = error.__cause__ or error.__context__
    if isinstance(found, ssl.SSLCertVerificationError):
        return f": its certificate is not trusted ({found.verify_message}); SSL_CERT_FILE names those to trust"
    return "" if found is None else f": it speaks no TLS that this client knows ({found.reason})"


def _site(request: httpx.Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc.decode()}"
