"""Classifies images for every protocol alike.

Each is counted and its answer remembered, and those of one address are kept within bounds.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from service.domain import ApiKey, Classification, InferenceRequest
from service.errors import OverloadedError, OverloadReason
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
        self._metrics, self._by_address = metrics, RequestsByClient(max_in_flight_per_address)
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
            self._answers.remember(REQUEST_ID.get(), wanted, classification, pipeline.checkpoint.class_names)
        return classification


class RequestsByClient:
    """Counts the requests of each client that are at some place, and keeps them within bounds."""

    def __init__(self, most: int, place: str = "in the server") -> None:
        """Take how many there may be of one client, and what is said of where they are."""
        self._most, self._place = most, place
        self._numbers: Counter[tuple[OverloadReason, str]] = Counter()

    @contextmanager
    def counting(self, address: str | None, key: ApiKey | None = None) -> Iterator[Callable[[], None]]:
        """Count a request of a client until the block ends.

        Args:
            address: of the client; None where it is not known, and nothing is counted.
            key: by which the client is known, wherever it is; None where that is by its address.

        Yields:
            What to call once it is there; raises an OverloadedError where too many are.
        """
        has_entered = False
        client = _client(address, key)

        def enter() -> None:
            nonlocal has_entered
            if client is None:
                return
            if self._numbers[client] >= self._most:
                whose = "with this key" if key is not None else "from this address"
                message = f"{self._most} requests {whose} are {self._place} already; try again later"
                raise OverloadedError(message, client[0], RETRY_AFTER_S)
            self._numbers[client] += 1
            has_entered = True

        try:
            yield enter
        finally:
            if has_entered and client is not None:
                self._numbers[client] -= 1
                if not self._numbers[client]:
                    del self._numbers[client]


def _client(address: str | None, key: ApiKey | None) -> tuple[OverloadReason, str] | None:
    """Name a client by what it is known by, and say what that is."""
    if key is not None:
        return "key", key.name
    return None if address is None else ("address", address)
