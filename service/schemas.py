"""What goes over the wire: query parameters in, answers out, as pydantic models."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.checkpoint import Checkpoint
from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork, SuperViTConfig
from service.domain import DEFAULT_TOP_K, Classification


class ClassifyQuery(BaseModel):
    """Query parameters of POST /classify."""

    model_config = ConfigDict(extra="forbid")

    budget_gflops: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="most that the answer may cost, in 1e9 multiply-accumulates"
    )
    top_k: int | None = Field(
        None, ge=1, description=f"predictions to return, up to the number of classes; {DEFAULT_TOP_K} by default"
    )
    patch_grid: int | None = Field(None, ge=1, description="with keep_rate: a sub-network by name, not by budget")
    keep_rate: float | None = Field(None, gt=0, le=1, description="with patch_grid: a sub-network by name")

    @model_validator(mode="after")
    def _both_or_none(self) -> "ClassifyQuery":
        if (self.patch_grid is None) != (self.keep_rate is None):
            raise ValueError("patch_grid and keep_rate go together: give both or none")
        return self

    @property
    def subnetwork(self) -> SubNetwork | None:
        """The sub-network asked for by name."""
        if self.patch_grid is None or self.keep_rate is None:
            return None
        return SubNetwork(self.patch_grid, self.keep_rate)


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
    expected_accuracy: float | None = Field(description="measured top-1, 0..1; null where nobody measured")


class DecisionAnswer(BaseModel):
    """Why that sub-network ran."""

    reason: str


class TimingAnswer(BaseModel):
    """Where the time went, in milliseconds; total runs from arrival to the finished answer."""

    decode: float
    queue: float
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
    model: ModelAnswer


class SubNetworkRow(SubNetworkAnswer):
    """One row of the table."""

    expected_top5_accuracy: float | None
    on_frontier: bool = Field(description="whether no cheaper sub-network is as accurate; others run only by name")


class SubNetworksAnswer(BaseModel):
    """Answer to GET /subnetworks."""

    model: ModelAnswer
    image_side_px: int
    num_classes: int
    subnetworks: list[SubNetworkRow] = Field(description="cheapest first")


class HealthAnswer(BaseModel):
    """Answer to the health checks."""

    status: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="machine-readable, stable")
    message: str = Field(description="a sentence for a person")
    details: dict[str, Any] = Field(description="values that a program may want")


class ErrorAnswer(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


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
        num_tokens=subnetwork.num_tokens,
        gflops=row.gflops,
        expected_accuracy=row.top1,
    )


def describe_family(checkpoint: Checkpoint) -> SubNetworksAnswer:
    """List every sub-network of a checkpoint, cheapest first."""
    config, profile = checkpoint.config, checkpoint.profile
    return SubNetworksAnswer(
        model=describe_model(checkpoint),
        image_side_px=config.image_side,
        num_classes=config.num_classes,
        subnetworks=[
            SubNetworkRow(
                **describe_subnetwork(row, config).model_dump(),
                expected_top5_accuracy=row.top5,
                on_frontier=row in profile.frontier,
            )
            for row in profile.rows
        ],
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
        decision=DecisionAnswer(reason=answer.decision.reason),
        timing_ms=TimingAnswer(
            decode=_ms(timing.decode_s),
            queue=_ms(timing.queue_s),
            inference=_ms(timing.inference_s),
            total=_ms(timing.total_s),
        ),
        model=describe_model(checkpoint),
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
