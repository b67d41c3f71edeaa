"""Classifies images for every protocol alike.

Each is counted and its answer remembered, and those of one address are kept within bounds.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from service.domain import Classification, InferenceRequest
from service.errors import OverloadedError
from service.pipeline import Image, Pipeline, Read
from service.recent_answers import RecentAnswers
from service.scheduling.state import QueuedRequest
from service.telemetry.logs import REQUEST_ID
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counted

RETRY_AFTER_S = 1.0


class Classifier:
    """What the protocols share on the way to the pipeline."""

    def __init__(self, metrics: Metrics, max_in_flight_per_address: int, answers: RecentAnswers) -> None:
        """Take what counts, how many requests of one address may be worked on at once, and what remembers answers."""
        self._metrics, self._by_address = metrics, RequestsByAddress(max_in_flight_per_address)
        self._answers = answers

    async def classify(
        self,
        pipeline: Pipeline,
        read: Read,
        wanted: InferenceRequest,
        watch: AbstractContextManager[object] | None = None,
        reserved: QueuedRequest | None = None,
    ) -> Classification:
        """Answer one request, count it and remember the answer.

        Arguments beside the pipeline and errors as `Pipeline.classify`.
        """
        with counted(self._metrics, wanted.key) as record, self._by_address.counting(wanted.address) as enter:

            async def read_and_enter(within_s: float) -> Image:
                image = await read(within_s)
                enter()  # not before: what drips in shall not keep others out
                return image

            classification = await pipeline.classify(read_and_enter, wanted, watch, reserved)
            record(classification)
            self._answers.remember(REQUEST_ID.get(), wanted, classification)
        return classification


class RequestsByAddress:
    """Counts the requests in flight of each address, and keeps them within bounds."""

    def __init__(self, max_in_flight: int) -> None:
        """Take how many there may be of one address."""
        self._max_in_flight = max_in_flight
        self._in_flight: Counter[str] = Counter()

    @contextmanager
    def counting(self, address: str | None) -> Iterator[Callable[[], None]]:
        """Count a request of an address until the block ends.

        Yields:
            What to call once it is in flight; raises an OverloadedError where too many are.
        """
        has_entered = False

        def enter() -> None:
            nonlocal has_entered
            if address is None:
                return
            if self._in_flight[address] >= self._max_in_flight:
                message = f"{self._max_in_flight} requests from this address are in the server already; try again later"
                raise OverloadedError(message, "address", RETRY_AFTER_S)
            self._in_flight[address] += 1
            has_entered = True

        try:
            yield enter
        finally:
            if has_entered and address is not None:
                self._in_flight[address] -= 1
                if not self._in_flight[address]:
                    del self._in_flight[address]
