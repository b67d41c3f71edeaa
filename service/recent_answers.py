"""The recent answers by request ID, so that clients can report afterwards which were right.

Their number is bounded: the oldest is dropped. What clients report about an answer is believed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from models.subnetwork import SubNetwork
from service.domain import ApiKey, Classification, InferenceRequest
from service.errors import UnknownRequestError

KEPT = 10_000  # answers, some 5 MB


@dataclass(slots=True)
class RecentAnswer:
    """What is remembered of an answer.

    Attributes:
        index: index of the most probable class, in the model that answered.
        class_names: class names of that model, which may not be the one served now.
        subnetwork: the sub-network of the first look.
        expected_top1: expected accuracy, 0..1, of what was chosen; None where unmeasured.
        is_judged: whether a client has reported if it was right.
    """

    index: int
    class_names: Sequence[str]
    subnetwork: SubNetwork
    expected_top1: float | None
    is_judged: bool = False

    @property
    def label(self) -> str:
        """The name of the most probable class."""
        return self.class_names[self.index]


class RecentAnswers:
    """Remembers the last answers; of several requests with one ID and one key, the last."""

    def __init__(self, kept: int = KEPT) -> None:
        """Start empty; at most `kept` answers are remembered."""
        self._kept = kept
        self._answers: OrderedDict[tuple[str | None, str, int], RecentAnswer] = OrderedDict()

    def remember(
        self, request_id: str | None, request: InferenceRequest, answer: Classification, class_names: Sequence[str]
    ) -> None:
        """Remember the answer to a request and the class names of its model, unless the request has no ID."""
        if request_id is None:
            return
        place = _key_name(request.key), request_id, request.image
        self._answers.pop(place, None)
        first = answer.looks[0].profile.subnetwork
        self._answers[place] = RecentAnswer(answer.predictions[0].index, class_names, first, answer.expected_top1)
        if len(self._answers) > self._kept:
            self._answers.popitem(last=False)

    def find(self, key: ApiKey | None, request_id: str, image: int) -> RecentAnswer:
        """Return the answer to a request.

        Args:
            key: API key of the request; the holder of a key cannot see answers to requests with other keys.
            request_id: ID of the request.
            image: index of the image in the request, from 0.

        Raises:
            UnknownRequestError: there was no such request, it has no answer, or the answer was dropped.
        """
        try:
            return self._answers[_key_name(key), request_id, image]
        except KeyError:
            message = f"no answer to image {image} of this request is kept; only the last {self._kept} answers are"
            raise UnknownRequestError(message) from None


def _key_name(key: ApiKey | None) -> str | None:
    return None if key is None else key.name
