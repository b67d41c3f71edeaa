"""Answers as pydantic models; the parameters of requests are in `request_parameters`.

`descriptions` creates them, and the client reads answers with the same models, so nothing here needs PyTorch.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.domain import LookCode


class ErrorDetail(BaseModel):
    """An error: its code, a message and details."""

    code: str = Field(description="machine-readable, stable")
    message: str = Field(description="a sentence for a person")
    details: dict[str, Any] = Field(description="values that a program may want")


class ErrorBody(BaseModel):
    """The part of an error that a client needs; servers before 0.2 send only this."""

    error: ErrorDetail


class ErrorAnswer(ErrorBody):
    """An error: a problem of RFC 9457 with the additional member `error`."""

    type: str = Field(description="urn:supervit:error: and the code")
    title: str = Field(description="the code in words")
    status: int = Field(description="of HTTP; of one of several images, what it alone would have been answered with")
    detail: str = Field(description="a sentence for a person, the message of `error`")


class PredictionAnswer(BaseModel):
    """A predicted class with its probability."""

    label: str
    index: int
    probability: float


class SubNetworkAnswer(BaseModel):
    """A sub-network with its cost and its expected accuracy."""

    patch_grid: int = Field(description="patches per side")
    patch_size_px: float = Field(description="side of a patch in pixels of the full-size input")
    keep_rate: float = Field(description="fraction of tokens kept at each prune block")
    num_tokens: int = Field(description="tokens that enter the first block, class token included")
    gflops: float = Field(description="cost of one image, in 1e9 multiply-accumulates")
    expected_accuracy: float | None = Field(description="top-1, 0..1; null where not measured")


class DecisionAnswer(BaseModel):
    """The scheduler's decision and the reason for it."""

    reason: str
    batch_size: int = Field(description="images that ran together")
    predicted_inference_ms: float = Field(description="what the batch was expected to take in the engine")


class LookAnswer(BaseModel):
    """One look at the image: one run of a sub-network."""

    patch_grid: int
    keep_rate: float
    gflops: float = Field(description="its cost, in 1e9 multiply-accumulates")
    confidence: float = Field(description="probability that it gave to its answer, 0..1, calibrated")
    inference_ms: float = Field(description="its batch in the engine")


class PlannedLookAnswer(BaseModel):
    """A second look at the image, which follows where the first is not confident enough."""

    patch_grid: int
    keep_rate: float
    gflops: float = Field(description="its cost, in 1e9 multiply-accumulates")
    threshold: float = Field(description="probability of the first answer, 0..1, under which it follows")
    share: float = Field(description="fraction of images, 0..1, that it followed for where it was measured")


class TimingAnswer(BaseModel):
    """Time of each stage in milliseconds; `total` runs from arrival to the finished answer."""

    decode_wait: float = Field(description="for a thread that decodes")
    decode: float
    queue: float = Field(description="for the engine")
    inference: float
    total: float


class ModelAnswer(BaseModel):
    """The checkpoint of the model that answers."""

    name: str
    version: str = Field(description="start of the SHA-256 of the checkpoint file")


class ClassifyAnswer(BaseModel):
    """Answer to POST /classify."""

    predictions: list[PredictionAnswer]
    subnetwork: SubNetworkAnswer = Field(description="that gave the answer")
    looks: list[LookAnswer] = Field(description="at the image; another follows where one was not sure enough")
    stopped: LookCode = Field(description="why no other look followed")
    gflops: float = Field(description="what all looks cost, in 1e9 multiply-accumulates")
    decision: DecisionAnswer
    timing_ms: TimingAnswer
    budget_ms: float = Field(description="time that was granted")
    deadline_met: bool = Field(description="whether the answer was finished within it")
    model: ModelAnswer


class PruningAnswer(BaseModel):
    """The patches that one pruning block kept."""

    block: int = Field(description="its index, from 0")
    kept: list[int] = Field(description="numbers of the patches that it kept, row by row from 0, ascending")
    scores: list[float] = Field(description="of each of them: the attention that the class token paid to it, 0..1")
    keeps_fused: bool = Field(description="whether it also kept the sum of those pruned before; some models have one")


class ExplanationAnswer(BaseModel):
    """The patches that the sub-network kept at each pruning block."""

    seen_share: float = Field(
        description="side of the square in the middle of the image that the model sees, over the image's shorter side"
    )
    prunings: list[PruningAnswer] = Field(description="of each block that prunes; none at a keep rate of 1")


class ExplainAnswer(ClassifyAnswer):
    """Answer to POST /explain."""

    explanation: ExplanationAnswer


class ResultAnswer(ClassifyAnswer):
    """Answer for one of several images."""

    status: Literal[200]


class ResultsAnswer(BaseModel):
    """Answer to POST /classify with several images."""

    results: list[ResultAnswer | ErrorAnswer] = Field(description="in the order of the images")


class DecideAnswer(BaseModel):
    """Answer to POST /decide."""

    subnetwork: SubNetworkAnswer
    second_look: PlannedLookAnswer | None = Field(description="null where one look is all that is planned")
    decision: DecisionAnswer
    answered_in_ms: float = Field(description="until the answer, upload left out")


class SubNetworkRow(SubNetworkAnswer):
    """A sub-network as GET /subnetworks lists it."""

    expected_top5_accuracy: float | None
    is_trained: bool = Field(description="whether the weights were trained at this keep rate")
    is_interpolated: bool = Field(description="whether the accuracy lies between two measured ones")
    temperature: float = Field(description="logits are divided by temperature * H ** entropy_exponent for the softmax")
    entropy_exponent: float = Field(description="0..1; H is the entropy of softmax(logits) over log(classes), 1e-6..1")
    calibration_error: float | None = Field(description="expected, 0..1, as measured; null where not measured")
    on_frontier: bool = Field(description="whether no cheaper sub-network is as accurate; others run only by name")
    latency_ms: dict[int, float] = Field(description="profiled latency on this machine by batch size")


class CascadeRow(BaseModel):
    """A cascade: a second sub-network runs only where the first is not confident enough."""

    first: SubNetworkAnswer
    second: SubNetworkAnswer
    threshold: float = Field(description="probability of the first answer, 0..1, under which the second looks")
    share: float = Field(description="fraction of images, 0..1, that were looked at again where it was measured")
    gflops: float = Field(description="expected cost, in 1e9 multiply-accumulates")
    most_gflops: float = Field(description="cost of both looks; budget_gflops is held against it")
    expected_accuracy: float = Field(description="top-1, 0..1")


class SubNetworksAnswer(BaseModel):
    """Answer to GET /subnetworks."""

    model: ModelAnswer
    image_side_px: int
    num_classes: int
    engine: str
    profiled_at: str = Field(description="when the latencies were measured")
    subnetworks: list[SubNetworkRow] = Field(description="cheapest first")
    cascades: list[CascadeRow] = Field(description="that the policy chooses from, cheapest first")


class ResourcesAnswer(BaseModel):
    """Answer to GET /resources: the machine, the traffic and the scheduler's estimates."""

    snapshot: dict[str, Any] = Field(description="the latest look at the machine; null where it does not say")
    age_s: float = Field(description="since that look")
    queued: int = Field(description="requests that wait for the engine")
    arrival_rate: float = Field(description="requests per second, of late")
    slowdown: float = Field(description="latency now over the profile's")
    expected_from_others: float = Field(description="slowdown that the others' load alone would let expect")
    overhead_factor: float = Field(description="time that the engine is taken for a batch over the batch's own")
    safety_factor: float = Field(description="factor on the times of all but the cheapest, for requests missed of late")
    max_batch_size: int = Field(description="most that may run together now")
    next_without_budget: DecideAnswer | None = Field(description="what a request would get; null if it were rejected")


class HealthAnswer(BaseModel):
    """Answer to the health checks."""

    status: str


class ReadyAnswer(HealthAnswer):
    """Answer to the readiness check."""

    profile_measured: float = Field(
        description="how much of the latencies in use is measured on this machine, 0..1; the rest is estimated"
    )
