"""The value types that the packages of the service share. All are frozen; instants are on the monotonic clock."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

import numpy as np
import numpy.typing as npt

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork

DEFAULT_TOP_K = 5
KEY_NAME = r"^[A-Za-z0-9._-]{1,64}$"  # safe in a log line and in a metric label
HIGHEST_PRIORITY, LOWEST_PRIORITY = 10, -10  # more than a handful of classes cannot be told apart
MAX_IMAGES = 16  # images in one message; each is a separate request


class ReasonCode(StrEnum):
    """Why a variant was chosen."""

    PINNED = "pinned"  # the sub-network was requested by name
    GFLOPS_BUDGET = "gflops_budget"  # the most accurate within the request's compute budget
    KEY_RATE = "key_rate"  # the most accurate within what the rate of its key has left
    ALONE = "alone"  # nothing else waits: the most accurate
    DEADLINE = "deadline"  # the most accurate that answers the one request in time
    FORECAST = "forecast"  # the same, with the requests that are expected
    ALL_IN_TIME = "all_in_time"  # the most accurate that answers the whole queue in time
    SUSTAINED_OVERLOAD = "sustained_overload"  # arrivals have exceeded all capacity for seconds: the cheapest
    BURST_OVERLOAD = "burst_overload"  # not even the cheapest answers the whole queue in time
    UNSURE = "unsure"  # the confidence of an earlier look was too low
    BASELINE = "baseline"  # chosen by a baseline policy
    NOTHING_TO_RUN = "nothing_to_run"


class LookCode(StrEnum):
    """Why an image was not looked at again."""

    SURE = "sure"  # the last look was sure enough, or no confidence was required
    NONE_BETTER = "none_better"  # the last look used the most accurate sub-network
    BUDGET = "budget"  # another look would exceed the compute budget
    DEADLINE = "deadline"  # another look would miss the deadline
    OVERLOAD = "overload"  # other requests need the time
    FAILED = "failed"  # the model failed at another look


class ServerState(Enum):
    """The lifecycle state of a server."""

    STARTING = "starting"  # warming up or measuring its latencies
    READY = "ready"
    DRAINING = "draining"  # takes no new requests, answers those admitted
    HUNG = "hung"  # a batch never ends


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key and its limits.

    Attributes:
        name: name in logs and metrics, which never contain the key itself.
        gflops_per_s: most work in the long run, in 1e9 multiply-accumulates per second; None for no bound.
        burst_gflops: most work at once beyond that, after a pause; None where `gflops_per_s` is None.
        weight: weight of its share of the work when all keys together want more than the machine can do.
        highest_priority: highest priority that its requests may ask for; a negative one is also their default.
        shortest_budget_ms: shortest latency budget that its requests may ask for; None for any.
        max_in_flight: its requests in the server at once; None for no bound of its own.
    """

    name: str
    gflops_per_s: float | None = None
    burst_gflops: float | None = None
    weight: float = 1.0
    highest_priority: int = 0
    shortest_budget_ms: float | None = None
    max_in_flight: int | None = None


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request to classify one image, with the client's limits.

    Attributes:
        arrived_at: when its first byte reached this process, in seconds.
        budget_ms: latency budget from `arrived_at`; None for the server's default.
        budget_gflops: most that its looks together may cost, in 1e9 multiply-accumulates; None for no limit.
        subnetwork: the sub-network requested by name; None leaves the choice to the policy.
        min_confidence: probability of the answer, 0..1, below which the image is to be looked at again.
        top_k: number of predictions to return; None for DEFAULT_TOP_K, or all classes if there are fewer.
        priority: lower may be rejected or shed first; None for 0, or the highest that its key allows if that is lower.
        address: address of its client; None where unknown.
        key: API key that it carries; None where the server requires none.
        client_waits_s: time from arrival after which its client is gone, whatever the budget; None where it stays.
        image: index of its image in the message, from 0.
        num_together: number of runs, this one and those after it, for which its key must have enough left: one for each
            image of a message, which are answered together or not at all, and one to explain the answer.
    """

    arrived_at: float
    budget_ms: float | None = None
    budget_gflops: float | None = None
    subnetwork: SubNetwork | None = None
    min_confidence: float = 0.0
    top_k: int | None = None
    priority: int | None = None
    address: str | None = None
    key: ApiKey | None = None
    client_waits_s: float | None = None
    image: int = 0
    num_together: int = 1


@dataclass(frozen=True, slots=True)
class Look:
    """One look at an image: one forward pass by one sub-network.

    Attributes:
        profile: profile of the sub-network.
        answer: index of the most probable class.
        confidence: calibrated probability of that class, 0..1.
        inference_s: time that the batch took in the engine.
        started_at: when the batch began.
    """

    profile: SubNetworkProfile
    answer: int
    confidence: float
    inference_s: float
    started_at: float


@dataclass(frozen=True, slots=True)
class SecondLook:
    """The second look of a cascade, which runs where the first is unsure.

    Attributes:
        index: catalog index of the variant that is this look alone.
        profile: profile of the sub-network that looks again.
        threshold: probability of the first answer, 0..1, under which it looks again.
        share: fraction of images that are looked at again, 0..1.
        top1: accuracy of the cascade, 0..1.
    """

    index: int
    profile: SubNetworkProfile
    threshold: float
    share: float
    top1: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen for a request.

    Attributes:
        profile: the sub-network, its cost and its accuracy.
        batch_size: images that ran together.
        predicted_s: predicted time of the batch in the engine.
        code: why it was chosen.
        reason: the same in a sentence.
        second_look: the look that follows an unsure first one, as far as that is known beforehand.
    """

    profile: SubNetworkProfile
    batch_size: int
    predicted_s: float
    code: ReasonCode
    reason: str
    second_look: SecondLook | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The prediction for a request that arrived now: the decision, and when its answer would come."""

    decision: Decision
    answered_in_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class and its probability, 0..1."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Timing:
    """The time spent in each stage, in seconds.

    Attributes:
        read_s: from arrival until the upload was complete.
        decode_wait_s: waiting for a decoding thread.
        decode_s: decoding the image.
        queue_s: waiting for the engine.
        inference_s: in the engine, the batches of all looks together.
        total_s: from arrival to the finished answer, the upload included.
    """

    read_s: float
    decode_wait_s: float
    decode_s: float
    queue_s: float
    inference_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer to an InferenceRequest.

    Attributes:
        predictions: the most probable classes, the best first, as many as were requested.
        probabilities: (classes,), the probability of every class.
        looks: the looks at the image, in order; the last one gave the answer.
        stopped: why no other look followed.
        decision: what ran last, and the reasons that led to it.
        timing: the time spent in each stage.
        budget_s: latency budget of the request.
        expected_top1: expected accuracy, 0..1, of what was chosen; None where unmeasured.
        accuracy_loss: expected accuracy of the best variant less `expected_top1`, at least 0; None where unmeasured.
        saved_gflops: cost of the most accurate sub-network less that of this answer; 0 where that is negative.
    """

    predictions: tuple[Prediction, ...]
    probabilities: npt.NDArray[np.float32] = field(compare=False, repr=False)
    looks: tuple[Look, ...]
    stopped: LookCode
    decision: Decision
    timing: Timing
    budget_s: float
    expected_top1: float | None
    accuracy_loss: float | None
    saved_gflops: float

    @property
    def gflops(self) -> float:
        """Cost of all looks, in 1e9 multiply-accumulates."""
        return sum(look.profile.macs for look in self.looks) / 1e9

    @property
    def deadline_met(self) -> bool:
        """Whether the answer was finished within the latency budget."""
        return self.timing.total_s <= self.budget_s
