"""Answers as pydantic models; the parameters of requests are in `request_parameters`.

`descriptions` creates them, and the client reads answers with the same models, so nothing here needs PyTorch.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.domain import LookCode


class ErrorDetail(BaseModel):
    """An error: its code, a message and details."""

    code: str = Field(description="machine-readable, stable")
    message: str = Field(description="human-readable message")
    details: dict[str, Any] = Field(description="values for programs")


class ErrorBody(BaseModel):
    """The part of an error that a client needs; servers before 0.2 send only this."""

    error: ErrorDetail


class ErrorAnswer(ErrorBody):
    """An error: a problem of RFC 9457 with the additional member `error`."""

    type: str = Field(description="urn:supervit:error: followed by the code")
    title: str = Field(description="the code in words")
    status: int = Field(description="HTTP status; for one of several images, the status that it alone would have got")
    detail: str = Field(description="the message of `error`")


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
    expected_accuracy: float | None = Field(description="top-1, 0..1; null if not measured")


class DecisionAnswer(BaseModel):
    """The scheduler's decision and the reason for it."""

    reason: str
    batch_size: int = Field(description="images in the batch")
    predicted_inference_ms: float = Field(description="predicted time of the batch in the engine")


class LookAnswer(BaseModel):
    """One look at the image: one run of a sub-network."""

    patch_grid: int
    keep_rate: float
    gflops: float = Field(description="cost of this look, in 1e9 multiply-accumulates")
    confidence: float = Field(description="calibrated probability of its answer, 0..1")
    inference_ms: float = Field(description="time of its batch in the engine")


class PlannedLookAnswer(BaseModel):
    """A second look at the image, which follows where the first is not confident enough."""

    patch_grid: int
    keep_rate: float
    gflops: float = Field(description="cost of this look, in 1e9 multiply-accumulates")
    threshold: float = Field(description="it follows if the probability of the first answer, 0..1, is below this")
    share: float = Field(description="measured fraction of images, 0..1, that needed it")


class TimingAnswer(BaseModel):
    """Time of each stage in milliseconds; `total` runs from arrival to the finished answer."""

    decode_wait: float = Field(description="wait for a decoding thread")
    decode: float
    queue: float = Field(description="wait for the engine")
    inference: float
    total: float


class ModelAnswer(BaseModel):
    """The checkpoint of the model that answers."""

    name: str
    version: str = Field(description="start of the SHA-256 of the checkpoint file")


class ClassifyAnswer(BaseModel):
    """Answer to POST /classify."""

    predictions: list[PredictionAnswer]
    subnetwork: SubNetworkAnswer = Field(description="the sub-network that gave the answer")
    looks: list[LookAnswer] = Field(description="looks at the image; another follows if one was not confident enough")
    stopped: LookCode = Field(description="why no other look followed")
    gflops: float = Field(description="cost of all looks, in 1e9 multiply-accumulates")
    decision: DecisionAnswer
    timing_ms: TimingAnswer
    budget_ms: float = Field(description="latency budget that was granted")
    deadline_met: bool = Field(description="whether the answer was ready within the latency budget")
    model: ModelAnswer


class PruningAnswer(BaseModel):
    """The patches that one pruning block kept."""

    block: int = Field(description="index of the block, from 0")
    kept: list[int] = Field(description="indices of the kept patches, row by row from 0, ascending")
    scores: list[float] = Field(description="attention of the class token to each kept patch, 0..1")
    keeps_fused: bool = Field(
        description="whether it also kept the fused token, which some models have, of patches pruned before"
    )


class ExplanationAnswer(BaseModel):
    """The patches that the sub-network kept at each pruning block."""

    seen_share: float = Field(
        description="side of the central square that the model sees, as a fraction of the image's shorter side"
    )
    prunings: list[PruningAnswer] = Field(description="one per pruning block; empty at a keep rate of 1")


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
    second_look: PlannedLookAnswer | None = Field(description="null if only one look is planned")
    decision: DecisionAnswer
    answered_in_ms: float = Field(description="predicted time until the answer, without the upload")


class FeedbackAnswer(BaseModel):
    """Answer to POST /feedback."""

    correct: bool = Field(description="whether the answer was correct, according to this feedback")
    counted: bool = Field(
        description="whether the feedback counts: only the first on an answer with an expected accuracy does"
    )


class SubNetworkRow(SubNetworkAnswer):
    """A sub-network as GET /subnetworks lists it."""

    expected_top5_accuracy: float | None
    is_trained: bool = Field(description="whether the weights were trained at this keep rate")
    is_interpolated: bool = Field(description="whether the accuracy is interpolated between two measured ones")
    temperature: float = Field(description="logits are divided by temperature * H ** entropy_exponent for the softmax")
    entropy_exponent: float = Field(description="0..1; H is the entropy of softmax(logits) over log(classes), 1e-6..1")
    calibration_error: float | None = Field(description="expected calibration error, 0..1; null if not measured")
    on_frontier: bool = Field(description="whether no cheaper sub-network is as accurate; others run only by name")
    latency_ms: dict[int, float] = Field(description="profiled latency on this machine by batch size")


class CascadeRow(BaseModel):
    """A cascade: a second sub-network runs only where the first is not confident enough."""

    first: SubNetworkAnswer
    second: SubNetworkAnswer
    threshold: float = Field(description="the second runs if the probability of the first answer, 0..1, is below this")
    share: float = Field(description="measured fraction of images, 0..1, that needed the second")
    gflops: float = Field(description="expected cost, in 1e9 multiply-accumulates")
    most_gflops: float = Field(description="cost of both looks, which budget_gflops must cover")
    expected_accuracy: float = Field(description="top-1, 0..1")


class SubNetworksAnswer(BaseModel):
    """Answer to GET /subnetworks."""

    model: ModelAnswer
    image_side_px: int
    num_classes: int
    engine: str
    profiled_at: str = Field(description="when the latencies were measured")
    subnetworks: list[SubNetworkRow] = Field(description="cheapest first")
    cascades: list[CascadeRow] = Field(description="the cascades that the policy chooses from, cheapest first")


class ResourcesAnswer(BaseModel):
    """Answer to GET /resources: the machine, the traffic and the scheduler's estimates."""

    snapshot: dict[str, Any] = Field(description="latest measurements of the machine; null where it reports none")
    age_s: float = Field(description="age of the snapshot")
    queued: int = Field(description="requests waiting for the engine")
    arrival_rate: float = Field(description="recent requests per second")
    slowdown: float = Field(description="current latency divided by the profile's")
    expected_from_others: float = Field(description="slowdown expected from the load of other processes alone")
    overhead_factor: float = Field(description="time that a batch occupies the engine, divided by the batch's own time")
    safety_factor: float = Field(description="factor on the times of all but the cheapest; grows with missed requests")
    max_batch_size: int = Field(description="largest batch that may run now")
    next_without_budget: DecideAnswer | None = Field(
        description="what a request without budgets would get; null if it would be rejected"
    )


class HealthAnswer(BaseModel):
    """Answer to the health checks."""

    status: str


class ReadyAnswer(HealthAnswer):
    """Answer to the readiness check."""

    profile_measured: float = Field(
        description="share of the latencies in use that is measured on this machine, 0..1; the rest is estimated"
    )
