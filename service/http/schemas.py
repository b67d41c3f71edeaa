"""What goes over the wire as an answer, as pydantic models; what comes in is in queries."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from models.checkpoint import Checkpoint
from models.profiles import SubNetworkProfile
from models.subnetwork import SuperViTConfig
from service.domain import Classification, Decision, Forecast
from service.scheduling.catalog import VariantCatalog


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="machine-readable, stable")
    message: str = Field(description="a sentence for a person")
    details: dict[str, Any] = Field(description="values that a program may want")


class ErrorAnswer(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


class PredictionAnswer(BaseModel):
    """One class."""

    label: str
    index: int
    probability: float


class SubNetworkAnswer(BaseModel):
    """A sub-network, what it costs and what it is worth."""

    patch_grid: int = Field(description="patches per side")
    patch_size_px: float = Field(description="side of a patch in pixels of the full-size input")
    keep_rate: float = Field(description="fraction of tokens kept at each prune block")
    num_tokens: int = Field(description="tokens that enter the first block, class token included")
    gflops: float = Field(description="cost of one image, in 1e9 multiply-accumulates")
    expected_accuracy: float | None = Field(description="top-1, 0..1; null where not measured")


class DecisionAnswer(BaseModel):
    """What was decided, and why."""

    reason: str
    batch_size: int = Field(description="images that ran together")
    predicted_inference_ms: float = Field(description="what the batch was expected to take in the engine")


class TimingAnswer(BaseModel):
    """Where the time went, in milliseconds; total runs from arrival to the finished answer."""

    decode_wait: float = Field(description="for a thread that decodes")
    decode: float
    queue: float = Field(description="for the engine")
    inference: float
    total: float


class ModelAnswer(BaseModel):
    """The checkpoint that answered."""

    name: str
    version: str = Field(description="start of the SHA-256 of the checkpoint file")


class ClassifyAnswer(BaseModel):
    """Answer to POST /classify."""

    predictions: list[PredictionAnswer]
    subnetwork: SubNetworkAnswer
    decision: DecisionAnswer
    timing_ms: TimingAnswer
    budget_ms: float = Field(description="time that was granted")
    deadline_met: bool = Field(description="whether the answer was finished within it")
    model: ModelAnswer


class ResultAnswer(ClassifyAnswer):
    """Answer to one of several images."""

    status: Literal[200]


class FailureAnswer(ErrorAnswer):
    """Why one of several images has no answer."""

    status: int = Field(description="what the image alone would have been answered with")


class ResultsAnswer(BaseModel):
    """Answer to POST /classify with several images."""

    results: list[ResultAnswer | FailureAnswer] = Field(description="in the order of the images")


class DecideAnswer(BaseModel):
    """Answer to POST /decide."""

    subnetwork: SubNetworkAnswer
    decision: DecisionAnswer
    answered_in_ms: float = Field(description="until the answer, upload left out")


class ResourcesAnswer(BaseModel):
    """Answer to GET /resources: the machine, the traffic, and what the policy makes of them."""

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


class SubNetworkRow(SubNetworkAnswer):
    """One row of the table."""

    expected_top5_accuracy: float | None
    is_trained: bool = Field(description="whether the weights were trained at this keep rate")
    is_interpolated: bool = Field(description="whether the accuracy lies between two measured ones")
    temperature: float = Field(description="logits are divided by temperature * H ** entropy_exponent for the softmax")
    entropy_exponent: float = Field(description="0..1; H is the entropy of softmax(logits) over log(classes), 1e-6..1")
    calibration_error: float | None = Field(description="expected, 0..1, as measured; null where not measured")
    on_frontier: bool = Field(description="whether no cheaper sub-network is as accurate; others run only by name")
    latency_ms: dict[int, float] = Field(description="profiled latency on this machine by batch size")


class SubNetworksAnswer(BaseModel):
    """Answer to GET /subnetworks."""

    model: ModelAnswer
    image_side_px: int
    num_classes: int
    engine: str
    profiled_at: str = Field(description="when the latencies were measured")
    subnetworks: list[SubNetworkRow] = Field(description="cheapest first")


class HealthAnswer(BaseModel):
    """Answer to the health checks."""

    status: str


class ReadyAnswer(HealthAnswer):
    """Answer to the check for readiness."""

    profile_measured: float = Field(
        description="how much of the latencies in use is measured on this machine, 0..1; the rest is estimated"
    )


def describe_model(checkpoint: Checkpoint) -> ModelAnswer:
    """Name the checkpoint."""
    return ModelAnswer(name=checkpoint.name, version=checkpoint.version)


def describe_subnetwork(row: SubNetworkProfile, config: SuperViTConfig) -> SubNetworkAnswer:
    """Describe one row of a profile."""
    subnetwork = row.subnetwork
    return SubNetworkAnswer(
        patch_grid=subnetwork.patch_grid,
        patch_size_px=config.patch_size_px(subnetwork),
        keep_rate=subnetwork.keep_rate,
        num_tokens=config.num_tokens(subnetwork),
        gflops=row.gflops,
        expected_accuracy=row.top1,
    )


def describe_family(
    checkpoint: Checkpoint, catalog: VariantCatalog, engine: str, profiled_at: str, batch_sizes: tuple[int, ...]
) -> SubNetworksAnswer:
    """List every variant, cheapest first."""
    config = checkpoint.config
    rows = [
        SubNetworkRow(
            **describe_subnetwork(variant.profile, config).model_dump(),
            expected_top5_accuracy=variant.profile.top5,
            is_trained=variant.profile.is_trained,
            is_interpolated=variant.profile.is_interpolated,
            temperature=variant.profile.temperature,
            entropy_exponent=variant.profile.entropy_exponent,
            calibration_error=variant.profile.calibration_error,
            on_frontier=variant in catalog.frontier,
            latency_ms={size: _ms(variant.latency_by_batch_s[size - 1]) for size in batch_sizes},
        )
        for variant in sorted(catalog.variants, key=lambda variant: variant.profile.macs)
    ]
    return SubNetworksAnswer(
        model=describe_model(checkpoint),
        image_side_px=config.image_side,
        num_classes=config.num_classes,
        engine=engine,
        profiled_at=profiled_at,
        subnetworks=rows,
    )


def describe_decision(decision: Decision) -> DecisionAnswer:
    """Put a decision on the wire."""
    return DecisionAnswer(
        reason=decision.reason,
        batch_size=decision.batch_size,
        predicted_inference_ms=_ms(decision.predicted_s),
    )


def describe_forecast(forecast: Forecast, config: SuperViTConfig) -> DecideAnswer:
    """Put a forecast on the wire."""
    return DecideAnswer(
        subnetwork=describe_subnetwork(forecast.decision.profile, config),
        decision=describe_decision(forecast.decision),
        answered_in_ms=_ms(forecast.answered_in_s),
    )


def describe_answer(answer: Classification, checkpoint: Checkpoint) -> ClassifyAnswer:
    """Put a finished classification on the wire."""
    timing = answer.timing
    return ClassifyAnswer(
        predictions=[
            PredictionAnswer(label=prediction.label, index=prediction.index, probability=prediction.probability)
            for prediction in answer.predictions
        ],
        subnetwork=describe_subnetwork(answer.decision.profile, checkpoint.config),
        decision=describe_decision(answer.decision),
        timing_ms=TimingAnswer(
            decode_wait=_ms(timing.decode_wait_s),
            decode=_ms(timing.decode_s),
            queue=_ms(timing.queue_s),
            inference=_ms(timing.inference_s),
            total=_ms(timing.total_s),
        ),
        budget_ms=_ms(answer.budget_s),
        deadline_met=answer.deadline_met,
        model=describe_model(checkpoint),
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
