"""The request for a model change and the report on one: values only, none of its steps."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

LEAST_AGREEMENT = 0.5
MOST_SLOWDOWN = 2.0

ChangeStep = Literal["load", "prepare", "compare", "rehearse", "canary", "watch", "retire"]
ChangeOutcome = Literal["done", "unchanged", "refused", "failed", "went_back", "stopped"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A period in which a new model works beside the old one.

    Attributes:
        share: fraction of the requests, 0..1.
        seconds: length of the period.
    """

    share: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A request to change the model.

    Attributes:
        checkpoint: the new checkpoint: a path, the name of one that ships, or of one on the hub.
        least_agreement: share of the sampled images, 0..1, on which it must agree with the old model.
        most_slowdown: most latency and cost that it may take, as a multiple of the old model's.
        force: whether to serve it even if it cannot be compared, or fails the comparison.
        shadow: how long it is compared on images that arrive meanwhile, and on which share of those that are sampled.
        canary: which share of the requests it answers, and for how long, before it answers all.
    """

    checkpoint: str
    least_agreement: float = LEAST_AGREEMENT
    most_slowdown: float = MOST_SLOWDOWN
    force: bool = False
    shadow: Trial | None = None
    canary: Trial | None = None


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """The progress of a change, or its outcome.

    Attributes:
        checkpoint: the checkpoint as it was requested.
        began_at: when the change began.
        step: the current step, or the one in which it ended.
        outcome: how it ended; None while it runs.
        message: the reason for the outcome; None where there is none to give.
        name: name of the new model, once it is loaded.
        version: version of the new model, once it is loaded.
        num_compared: images that both models have answered.
        agreement: share of these images on which both agree, 0..1; None where there are none.
        latency_ratio: median of the new model's latency over the old one's, one image each; None with too few images.
        seconds: how long the change took; None while it runs.
    """

    checkpoint: str
    began_at: datetime
    step: ChangeStep = "load"
    outcome: ChangeOutcome | None = None
    message: str | None = None
    name: str | None = None
    version: str | None = None
    num_compared: int = 0
    agreement: float | None = None
    latency_ratio: float | None = None
    seconds: float | None = None
