"""The nouns that pass between the rooms of the service. All are frozen; instants are on the monotonic clock."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

import numpy as np
import numpy.typing as npt

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork

DEFAULT_TOP_K = 5
KEY_NAME = r"^[A-Za-z0-9._-]{1,64}$"  # fit for a log and a label
HIGHEST_PRIORITY, LOWEST_PRIORITY = 10, -10  # more than a handful of classes cannot be told apart
MAX_IMAGES = 16  # that one message may bring; each is a request of its own


class ReasonCode(StrEnum):
    """Why a variant was chosen."""

    PINNED = "pinned"  # it was asked for by name
    GFLOPS_BUDGET = "gflops_budget"  # it uses the budget of compute up
    KEY_RATE = "key_rate"  # it uses up what the rate of its key has left
    ALONE = "alone"  # nothing else waits: the most accurate
    DEADLINE = "deadline"  # the most accurate that answers the one request in time
    FORECAST = "forecast"  # likewise, with the requests that are expected
    ALL_IN_TIME = "all_in_time"  # the most accurate that answers the whole queue in time
    SUSTAINED_OVERLOAD = "sustained_overload"  # arrivals have exceeded all capacity for seconds: the cheapest
    BURST_OVERLOAD = "burst_overload"  # not even the cheapest answers all of the queue in time
    UNSURE = "unsure"  # an earlier look was not sure enough of the answer
    BASELINE = "baseline"  # by the rule of a policy that is not ours
    NOTHING_TO_RUN = "nothing_to_run"


class LookCode(StrEnum):
    """Why an image was not looked at again."""

    SURE = "sure"  # the last look was, or none was asked to be
    NONE_BETTER = "none_better"  # it was at the most accurate sub-network
    BUDGET = "budget"  # it would cost more than the request may
    DEADLINE = "deadline"  # it would be late
    OVERLOAD = "overload"  # others need the time
    FAILED = "failed"  # the model could not


class ServerState(Enum):
    """What a server is at."""

    STARTING = "starting"  # it warms up or measures its latencies
    READY = "ready"
    DRAINING = "draining"  # it takes no new request, and answers those admitted
    HUNG = "hung"  # a batch of it never ends


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What the holder of a key may ask of this server.

    Attributes:
        name: for logs and metrics; the key itself is in neither.
        gflops_per_s: most work in the long run, in 1e9 multiply-accumulates per second; None for no bound.
        burst_gflops: most work at once beyond that, after a pause; None where `gflops_per_s` is.
        weight: of its share of the work where all keys together want more than the machine can do.
        highest_priority: that its requests may ask for, and get where they ask for none.
        shortest_budget_ms: that its requests may ask for; None for any.
        max_in_flight: requests in the server at once; None for no bound of its own.
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
    """What a client asks for.

    Attributes:
        arrived_at: when its first byte was handed to us, in seconds.
        budget_ms: time from then on within which its answer is wanted; None for the server's default.
        budget_gflops: most that its sub-network may cost, in 1e9 multiply-accumulates; None for no limit.
        subnetwork: the one asked for by name; None leaves the choice to the policy.
        min_confidence: probability of the answer, 0..1, under which it wants the image looked at again.
        top_k: how many predictions to return; None for DEFAULT_TOP_K, or all classes if there are fewer.
        priority: lower may be rejected or shed first; None for 0, or the highest that its key allows if that is lower.
        address: that it came from; None where that is not known.
        key: that it came with; None where none is asked for.
        client_waits_s: time from its arrival after which its client is gone, whatever the budget; None where it stays.
        image: its place among those that came with one message, from 0.
        num_together: it and the images after it that are answered with it or not at all; 1 where it stands alone.
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
    """One look at an image.

    Attributes:
        profile: of the sub-network that looked.
        answer: index of the class that it took for the most probable.
        confidence: calibrated probability of that, 0..1.
        inference_s: the batch in the engine.
        started_at: when that began.
    """

    profile: SubNetworkProfile
    answer: int
    confidence: float
    inference_s: float
    started_at: float


@dataclass(frozen=True, slots=True)
class PlannedLook:
    """A second look that depends on the first.

    Attributes:
        profile: of the sub-network that would look.
        threshold: probability of the first answer, 0..1, under which it does.
        share: fraction of images, 0..1, for which that was so where it was measured.
    """

    profile: SubNetworkProfile
    threshold: float
    share: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen for a request.

    Attributes:
        profile: the sub-network, its cost and its accuracy.
        batch_size: images that ran together.
        predicted_s: what the batch was expected to take in the engine.
        code: why.
        reason: the same in a sentence.
        second_look: what follows where the first look is unsure, as far as is known beforehand.
    """

    profile: SubNetworkProfile
    batch_size: int
    predicted_s: float
    code: ReasonCode
    reason: str
    second_look: PlannedLook | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a request that arrived now: the decision, and when its answer would come."""

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
    """Where the time went, in seconds.

    Attributes:
        read_s: from arrival until the whole upload was there.
        decode_wait_s: waiting for a thread that decodes.
        decode_s: at work on the image's bytes.
        queue_s: waiting for the engine.
        inference_s: the batch in the engine.
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
        predictions: the best first, as many as were asked for.
        probabilities: (classes,), of every class.
        looks: at the image, in their order; the last one gave the answer.
        stopped: why no other followed.
        decision: what ran last, and why it came to that.
        timing: where the time went.
        budget_s: what was granted.
        expected_top1: accuracy, 0..1, of what was chosen for it; None where unmeasured.
        accuracy_loss: how much more the most accurate variant would have had; None where unmeasured.
        saved_gflops: what the most accurate sub-network would have cost more; 0 where it would have cost less.
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
        """What all looks cost, in 1e9 multiply-accumulates."""
        return sum(look.profile.macs for look in self.looks) / 1e9

    @property
    def deadline_met(self) -> bool:
        """Whether the answer came in time."""
        return self.timing.total_s <= self.budget_s
