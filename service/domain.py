"""The nouns that pass between the rooms of the service. All are frozen; instants are on the monotonic clock."""

from dataclasses import dataclass

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork

DEFAULT_TOP_K = 5


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What a client asks for.

    Attributes:
        arrived_at: when its first byte was handed to us, in seconds.
        budget_gflops: most that its sub-network may cost, in 1e9 multiply-accumulates; None for no limit.
        subnetwork: the one asked for by name; None leaves the choice to the policy.
        top_k: how many predictions to return; None for DEFAULT_TOP_K, or all classes if there are fewer.
    """

    arrived_at: float
    budget_gflops: float | None
    subnetwork: SubNetwork | None
    top_k: int | None


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen sub-network and, in words a person understands, why."""

    profile: SubNetworkProfile
    reason: str


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
        decode_s: at work on the image's bytes.
        queue_s: waiting for a thread that decodes, and for the engine.
        inference_s: the batch in the engine.
        total_s: from arrival to the finished answer, the upload included.
    """

    decode_s: float
    queue_s: float
    inference_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer to an InferenceRequest."""

    predictions: tuple[Prediction, ...]
    decision: Decision
    timing: Timing
