"""The answers of late by the names of their requests, so that clients can say afterwards which were right.

It is as long as it is, whatever comes: the oldest is forgotten. What is said of an answer is believed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from models.subnetwork import SubNetwork
from service.domain import ApiKey, Classification, InferenceRequest
from service.errors import UnknownRequestError

KEPT = 10_000  # some 5 MB


@dataclass(slots=True)
class RecentAnswer:
    """What is remembered of an answer.

    Attributes:
        index: of the class that it took for the most probable, of the model that it came from.
        class_names: of that model, which may be another than is served meanwhile.
        subnetwork: that looked first.
        expected_top1: accuracy, 0..1, of what was chosen for it; None where unmeasured.
        is_judged: whether it is known if it was right.
    """

    index: int
    class_names: Sequence[str]
    subnetwork: SubNetwork
    expected_top1: float | None
    is_judged: bool = False

    @property
    def label(self) -> str:
        """The name of that class."""
        return self.class_names[self.index]


class RecentAnswers:
    """Remembers the last answers. Of several requests of one name and one key, it is the last."""

    def __init__(self, kept: int = KEPT) -> None:
        """Take how many to remember."""
        self._kept = kept
        self._answers: OrderedDict[tuple[str | None, str, int], RecentAnswer] = OrderedDict()

    def remember(
        self, request_id: str | None, request: InferenceRequest, answer: Classification, class_names: Sequence[str]
    ) -> None:
        """Remember the answer to a request, and the classes of the model that gave it, unless it has no name."""
        if request_id is None:
            return
        place = _key_name(request.key), request_id, request.image
        self._answers.pop(place, None)
        first = answer.looks[0].profile.subnetwork
        self._answers[place] = RecentAnswer(answer.predictions[0].index, class_names, first, answer.expected_top1)
        if len(self._answers) > self._kept:
            self._answers.popitem(last=False)

    def find(self, key: ApiKey | None, request_id: str, image: int) -> RecentAnswer:
        """Return what was answered.

        Args:
            key: that the request came with: those of other keys are none of its holder's business.
            request_id: its name.
            image: which of its images, from 0.

        Raises:
            UnknownRequestError: there was no such request, or no answer to it, or it is forgotten.
        """
        try:
            return self._answers[_key_name(key), request_id, image]
        except KeyError:
            message = f"no answer to image {image} of such a request is remembered; the last {self._kept} are"
            raise UnknownRequestError(message) from None


def _key_name(key: ApiKey | None) -> str | None:
    return None if key is None else key.name
