"""What is asked of a change of the model, and what is told of one: values, and no step of it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

LEAST_AGREEMENT = 0.5
MOST_SLOWDOWN = 2.0

ChangeStep = Literal["load", "prepare", "compare", "rehearse", "canary", "watch", "retire"]
ChangeOutcome = Literal["done", "unchanged", "refused", "failed", "went_back", "stopped"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A new model at work beside the old one.

    Attributes:
        share: of the requests, 0..1.
        seconds: for which.
    """

    share: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ModelChange:
    """What is asked.

    Attributes:
        checkpoint: to be served: a path, the name of one that ships, or of one of the hub.
        least_agreement: share of the sampled images, 0..1, on which it must say what the old one says.
        most_slowdown: times the old one's latency and cost that it may take.
        force: whether to serve it even where it cannot be compared, or is compared and found wanting.
        shadow: how long it is compared on images that come meanwhile, and on which share of those that are sampled.
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
    """How a change gets on, or how it has ended.

    Attributes:
        checkpoint: as it was asked for.
        began_at: when.
        step: that it is at, or ended in.
        outcome: None while it goes on.
        message: why it is no other outcome.
        name: of the new model, once it is loaded.
        version: of it.
        num_compared: images that both models have answered.
        agreement: share of them on which they agree, 0..1; None where there are none.
        latency_ratio: median of the new one's latency over the old one's, one image each; None where there are too few.
        seconds: that it has taken.
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
