"""A client of a SuperViT server: typed answers, typed errors, and retries as long as there is time.

    with Client("http://127.0.0.1:8000") as client:
        answer = client.classify("dalmatian.jpg", budget_gflops=2.3, budget_ms=300)
        print(answer.predictions[0].label, answer.subnetwork.gflops)

`AsyncClient` is the same for `await`. Both only send and sleep: `retries` decides what is sent, when it is sent again
and what an answer means. Errors are those of `service.errors`, rebuilt from the server's answers.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any, Self, Unpack

import httpx

from service.errors import InvalidParameterError
from service.http.schemas import (
    ClassifyAnswer,
    DecideAnswer,
    ExplainAnswer,
    FeedbackAnswer,
    ReadyAnswer,
    SubNetworksAnswer,
)
from service.retries import (
    Answer,
    Call,
    ClassifyOptions,
    Clock,
    DecideOptions,
    Pause,
    Reply,
    Retries,
    RetryPolicy,
    bearer,
)

TIMEOUT_S = 60.0
MAX_RETRIES = 2

Image = bytes | str | os.PathLike[str] | IO[bytes]


class Client:
    """A blocking client; close it, or use it in a `with` block. Threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        draw: Clock = random.random,
    ) -> None:
        """Create a client; the first request opens a connection.

        Args:
            url: URL of the server, such as http://127.0.0.1:8000.
            api_key: API key, for a server that requires one.
            timeout_s: longest silence of the server, and how long a request without a latency budget is retried.
            max_retries: most retries of a request.
            transport: carries the requests; the network by default.
            clock: monotonic, in seconds.
            sleep: waits for the given number of seconds.
            draw: returns a random number in 0..1, which spreads the retries of clients that were rejected together.

        Raises:
            InvalidParameterError: `url` is not an HTTP URL.
        """
        headers = bearer(api_key)
        self._http = httpx.Client(base_url=_checked(url), headers=headers, timeout=timeout_s, transport=transport)
        self._retry_policy = RetryPolicy(timeout_s, max_retries, clock, draw)
        self._sleep = sleep

    def classify(self, image: Image, **options: Unpack[ClassifyOptions]) -> ClassifyAnswer:
        """Classify an image.

        Args:
            image: the bytes of a file, its path, or an open file.
            options: see `ClassifyOptions`.

        Raises:
            ServiceError: one of `service.errors`, such as OverloadedError, DeadlineError or InvalidImageError.
            NoAnswerError: there is no server, or what answers is not a SuperViT server.
            OSError: the file cannot be read.
        """
        return self._ask(Retries.of_classify(self._retry_policy, _read_image(image), options))

    def explain(self, image: Image, **options: Unpack[ClassifyOptions]) -> ExplainAnswer:
        """Classify an image and explain which of its patches were kept; arguments and errors as `classify`."""
        return self._ask(Retries.of_explain(self._retry_policy, _read_image(image), options))

    def decide(self, **options: Unpack[DecideOptions]) -> DecideAnswer:
        """Ask what the server would do with a request now; errors as `classify`."""
        return self._ask(Retries.of_decide(self._retry_policy, options))

    def feedback(
        self, request_id: str, *, label: str | None = None, index: int | None = None, image: int = 0
    ) -> FeedbackAnswer:
        """Report the correct class of an earlier answer, by its name or its index; errors as `classify`.

        Args:
            request_id: the `request_id` that was given to `classify`.
            label: name of the correct class.
            index: index of the correct class.
            image: index of the image, from 0, of a request with several.
        """
        return self._ask(Retries.of_feedback(self._retry_policy, request_id, label, index, image))

    def subnetworks(self) -> SubNetworksAnswer:
        """List the sub-networks with their cost and accuracy; errors as `classify`."""
        return self._ask(Retries(self._retry_policy, SubNetworksAnswer, Call("GET", "/subnetworks")))

    def wait_until_ready(self, within_s: float = TIMEOUT_S) -> ReadyAnswer:
        """Wait until a starting server is ready; errors as `classify`, the last one if it is not ready in time."""
        return self._ask(Retries.of_readiness(self._retry_policy, within_s))

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, tries: Retries[Answer]) -> Answer:
        while True:
            try:
                reply: Reply = self._http.request(**_next_request(tries))
            except httpx.HTTPError as error:
                reply = error
            outcome = tries.judge(reply)
            if not isinstance(outcome, Pause):
                return outcome
            self._sleep(outcome.seconds)


class AsyncClient:
    """A client that does not block the event loop; close it, or use it in an `async with` block."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Clock = random.random,
    ) -> None:
        """Create a client; arguments, but for the clock, and errors as those of `Client`."""
        headers = bearer(api_key)
        self._http = httpx.AsyncClient(base_url=_checked(url), headers=headers, timeout=timeout_s, transport=transport)
        self._retry_policy = RetryPolicy(timeout_s, max_retries, time.monotonic, draw)
        self._sleep = sleep

    async def classify(self, image: Image, **options: Unpack[ClassifyOptions]) -> ClassifyAnswer:
        """Classify an image; arguments and errors as `Client.classify`."""
        data = await asyncio.to_thread(_read_image, image)
        return await self._ask(Retries.of_classify(self._retry_policy, data, options))

    async def explain(self, image: Image, **options: Unpack[ClassifyOptions]) -> ExplainAnswer:
        """Classify an image and explain which of its patches were kept; arguments and errors as `classify`."""
        data = await asyncio.to_thread(_read_image, image)
        return await self._ask(Retries.of_explain(self._retry_policy, data, options))

    async def decide(self, **options: Unpack[DecideOptions]) -> DecideAnswer:
        """Ask what the server would do with a request now; errors as `Client.classify`."""
        return await self._ask(Retries.of_decide(self._retry_policy, options))

    async def feedback(
        self, request_id: str, *, label: str | None = None, index: int | None = None, image: int = 0
    ) -> FeedbackAnswer:
        """Report the correct class of an earlier answer; arguments and errors as `Client.feedback`."""
        return await self._ask(Retries.of_feedback(self._retry_policy, request_id, label, index, image))

    async def subnetworks(self) -> SubNetworksAnswer:
        """List the sub-networks with their cost and accuracy; errors as `Client.classify`."""
        return await self._ask(Retries(self._retry_policy, SubNetworksAnswer, Call("GET", "/subnetworks")))

    async def wait_until_ready(self, within_s: float = TIMEOUT_S) -> ReadyAnswer:
        """Wait until a starting server is ready; errors as `Client.wait_until_ready`."""
        return await self._ask(Retries.of_readiness(self._retry_policy, within_s))

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, tries: Retries[Answer]) -> Answer:
        while True:
            try:
                reply: Reply = await self._http.request(**_next_request(tries))
            except httpx.HTTPError as error:
                reply = error
            outcome = tries.judge(reply)
            if not isinstance(outcome, Pause):
                return outcome
            await self._sleep(outcome.seconds)


def _checked(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InvalidParameterError(f"{url} is not a URL", parameter="url") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidParameterError(f"{url} is not a URL that begins with http:// or https://", parameter="url")
    return parsed


def _next_request(tries: Retries[Answer]) -> dict[str, Any]:
    """Return what httpx sends at the next try, by the names of its arguments; errors as `Retries.next_call`."""
    call = tries.next_call()
    return {
        "method": call.method,
        "url": call.path,
        "params": call.query,
        "content": call.body,
        "headers": call.headers,
        "timeout": httpx.USE_CLIENT_DEFAULT if tries.timeout_s is None else tries.timeout_s,
    }


def _read_image(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if hasattr(image, "read"):
        return image.read()
    raise TypeError(f"an image is a path, bytes or a binary file, not {type(image).__name__}")
