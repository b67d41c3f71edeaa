"""What a client sends, when again, and what the answers say. Sends nothing itself and never sleeps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Generic, TypedDict, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.errors import (
    ConnectionFailedError,
    OverloadedError,
    ResponseTimeoutError,
    ServiceError,
    UnexpectedAnswerError,
    UnreachableError,
    rebuild_error,
)
from service.http.schemas import ClassifyAnswer, ErrorBody, ExplainAnswer, ReadyAnswer

# What the first further try waits for at most beyond what the server asks for; each one after it twice as long.
BACKOFF_S = 0.1
POLL_S = 0.05

Answer = TypeVar("Answer", bound=BaseModel)
Clock = Callable[[], float]
Reply = httpx.Response | httpx.HTTPError


class ClassifyOptions(TypedDict, total=False):
    """What a request may say beside its image; what is left out or None is up to the server.

    Attributes:
        budget_gflops: most that the answer may cost, in 1e9 multiply-accumulates.
        budget_ms: time from the call, further tries included, within which the answer is wanted.
        min_confidence: probability of the answer, 0..1, under which the image is looked at again.
        priority: 0 is normal; down to -10 may be rejected or shed first.
        top_k: predictions to return.
        patch_grid: with keep_rate: a sub-network by name.
        keep_rate: with patch_grid: a sub-network by name.
    """

    budget_gflops: float | None
    budget_ms: float | None
    min_confidence: float | None
    priority: int | None
    top_k: int | None
    patch_grid: int | None
    keep_rate: float | None


def bearer(api_key: str | None) -> dict[str, str]:
    """Return the headers in which a key is sent."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


@dataclass(frozen=True, slots=True)
class Call:
    """What is to be sent."""

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None

    @classmethod
    def of(cls, path: str, image: bytes, options: ClassifyOptions) -> "Call":
        """Send an image with what is said beside it."""
        return cls("POST", path, {name: value for name, value in options.items() if value is not None}, image)


@dataclass(frozen=True, slots=True)
class Pause:
    """How long to wait before the next try."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long and how often a request is tried, by which clock, and what draws its pauses."""

    timeout_s: float
    max_retries: float
    clock: Clock
    draw: Clock


class Tries(Generic[Answer]):
    """One request, tried until it is answered, refused for good or out of time. Neither sends nor sleeps."""

    def __init__(
        self,
        patience: Patience,
        kind: type[Answer],
        call: Call,
        *,
        budget_ms: float | None = None,
        poll_s: float | None = None,
    ) -> None:
        """Begin now.

        Args:
            patience: how long and how often.
            kind: of the answer.
            call: what is sent.
            budget_ms: time for all tries together, of which the server is told what is left.
            poll_s: pause after which a server that does not answer yet is asked again; by default as it says.
        """
        self._patience, self._kind, self._call, self._poll_s = patience, kind, call, poll_s
        self._budget_ms, self._errors = budget_ms, list[ServiceError]()
        self._ends_at = patience.clock() + (patience.timeout_s if budget_ms is None else budget_ms / 1000)

    @classmethod
    def of_classify(cls, patience: Patience, image: bytes, options: ClassifyOptions) -> "Tries[ClassifyAnswer]":
        """Ask what an image shows."""
        return Tries(patience, ClassifyAnswer, Call.of("/classify", image, options), budget_ms=options.get("budget_ms"))

    @classmethod
    def of_explain(cls, patience: Patience, image: bytes, options: ClassifyOptions) -> "Tries[ExplainAnswer]":
        """Ask what an image shows, and what was looked at."""
        return Tries(patience, ExplainAnswer, Call.of("/explain", image, options), budget_ms=options.get("budget_ms"))

    @classmethod
    def of_readiness(cls, patience: Patience, within_s: float) -> "Tries[ReadyAnswer]":
        """Ask again and again whether the server is ready."""
        waiting = Patience(within_s, math.inf, patience.clock, patience.draw)
        return Tries(waiting, ReadyAnswer, Call("GET", "/health/ready"), poll_s=POLL_S)

    def next_call(self) -> Call:
        """Tell what to send now; a further try gets what is left of the budget."""
        if not self._errors or self._budget_ms is None:
            return self._call
        left_ms = 1000 * (self._ends_at - self._patience.clock())
        if left_ms <= 0:  # the pause took longer than it should have
            raise self._errors[-1]
        return replace(self._call, query={**self._call.query, "budget_ms": left_ms})

    def judge(self, reply: Reply) -> Answer | Pause:
        """Return the answer, or how long to wait before another try; raise the error where there is to be none."""
        try:
            return _read(reply, self._kind)
        except ServiceError as error:
            pause_s = self._pause_s(reply, error)
            if pause_s is None or len(self._errors) >= self._patience.max_retries:
                raise
            if not self._patience.clock() + pause_s < self._ends_at:  # so that NaN is never waited for
                raise
            self._errors.append(error)
        return Pause(pause_s)

    def _pause_s(self, reply: Reply, error: ServiceError) -> float | None:
        asked_s = _retry_after_s(reply, error)
        if asked_s is None:
            return None
        if self._poll_s is not None:
            return self._poll_s
        return asked_s + self._patience.draw() * BACKOFF_S * 2.0 ** len(self._errors)


def _retry_after_s(reply: Reply, error: ServiceError) -> float | None:
    """Tell after how long another try is invited; None where it would be in vain, or the request may be under way."""
    if isinstance(reply, httpx.HTTPError):
        return 0.0 if isinstance(reply, httpx.ConnectError | httpx.ConnectTimeout) else None
    if reply.status_code not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return None
    if isinstance(error, OverloadedError):  # the header has whole seconds
        return error.retry_after_s
    header = reply.headers.get("Retry-After", "")
    return float(header) if header.isdecimal() else None


def _read(reply: Reply, kind: type[Answer]) -> Answer:
    """Read an answer of this kind, or raise what kept it from being given."""
    if isinstance(reply, httpx.HTTPError):
        raise _broken(reply) from reply
    try:
        if reply.status_code == HTTPStatus.OK:
            return kind.model_validate_json(reply.content)
        problem = ErrorBody.model_validate_json(reply.content).error
    except ValidationError as error:
        what = f"{_site(reply.request)} does not answer as a SuperViT server does"
        raise UnexpectedAnswerError(what, status=reply.status_code) from error
    raise rebuild_error(problem.code, problem.message, problem.details)


def _broken(error: httpx.HTTPError) -> ServiceError:
    site = _site(error.request)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return UnreachableError(f"{site} cannot be connected to")
    if isinstance(error, httpx.TimeoutException):
        return ResponseTimeoutError(f"{site} was silent for too long")
    return ConnectionFailedError(f"{site} closed the connection before its answer")


def _site(request: httpx.Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc.decode()}"
