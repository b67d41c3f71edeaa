"""Hand-made results of batches of requests."""

from collections.abc import Sequence

import numpy as np
import torch

from service.execution.results import Result
from service.scheduling.state import BatchDecision
from service.scheduling.variants import Variant

IMAGE = torch.zeros((3, 2, 2), dtype=torch.uint8)
NUM_CLASSES = 7


def looks_of(
    variant: Variant,
    answers: Sequence[int],
    seconds: float = 0.01,
    ended_at: float = 0.0,
    before: Result | None = None,
    confidence: float = 0.9,
) -> list[Result]:
    """Make the results of a batch of looks, whose most probable classes are `answers`."""
    results = []
    for answer in answers:
        probabilities = np.full(NUM_CLASSES, (1 - confidence) / (NUM_CLASSES - 1), np.float32)
        probabilities[answer] = confidence
        results.append(
            Result(
                np.log(probabilities),
                probabilities,
                np.roll(np.arange(NUM_CLASSES), -answer),
                variant,
                BatchDecision(variant),
                batch_size=len(answers),
                predicted_s=seconds,
                inference_s=seconds,
                started_at=ended_at - seconds,
                ended_at=ended_at,
                before=before,
            )
        )
    return results
