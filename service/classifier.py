"""Classifies images for all protocols.

Requests are counted, their number per address is bounded, and their answers are remembered.
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
    """The steps around the pipeline that all protocols share."""

    def __init__(self, metrics: Metrics, max_in_flight_per_address: int, answers: RecentAnswers) -> None:
        """Create a classifier.

        Args:
            metrics: counts the requests.
            max_in_flight_per_address: requests of one address that may be in the server at once.
            answers: remembers the answers.
        """
        self._metrics, self._by_address = metrics, ClientLimiter(max_in_flight_per_address)
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

        The arguments after `pipeline` and the errors are those of `Pipeline.classify`.
        """
        with counted(self._metrics, wanted.key) as record, self._by_address.counting(wanted.address) as enter:

            async def read_and_enter(within_s: float) -> Image:
                image = await read(within_s)
                enter()  # only now: an image that arrives slowly must not keep others out
                return image

            classification = await pipeline.classify(read_and_enter, wanted, watch, reserved)
            record(classification)
            self._answers.remember(REQUEST_ID.get(), wanted, classification, pipeline.checkpoint.class_names)
        return classification


class ClientLimiter:
    """Counts the requests of each client at one stage, such as in the server, and bounds their number."""

    def __init__(self, most: int, place: str = "in the server") -> None:
        """Create a counter.

        Args:
            most: requests of one client that may be at this stage at once.
            place: the stage, as error messages name it.
        """
        self._most, self._place = most, place
        self._numbers: Counter[tuple[OverloadReason, str]] = Counter()

    @contextmanager
    def counting(self, address: str | None, key: ApiKey | None = None) -> Iterator[Callable[[], None]]:
        """Count a request of a client until the block ends.

        Args:
            address: address of the client; None where unknown: without a key, nothing is then counted.
            key: identifies the client at any address; None to identify it by its address.

        Yields:
            A function to call once the request is at this stage; raises an OverloadedError if too many are.
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
    """Return the kind and the value of what identifies a client: its key, or else its address; None without either."""
    if key is not None:
        return "key", key.name
    return None if address is None else ("address", address)
