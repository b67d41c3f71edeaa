import numpy as np
import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from service.execution.live_sample import KEPT_IMAGES, KEPT_SHAPES, LiveSample, SampledImage
from service.execution.results import Ranked

SMALL = SubNetwork(2, 0.5)


def image(value: int) -> Tensor:
    return torch.full((3, 2, 2), value, dtype=torch.uint8)


def said(*probabilities: float) -> list[Ranked]:
    return [
        Ranked(np.zeros(2, np.float32), np.array([each, 0.0], np.float32), np.array([0, 1])) for each in probabilities
    ]


def test_one_image_of_a_batch_is_kept_and_taken_once() -> None:
    sample = LiveSample()
    sample.answered([image(1), image(2)], SMALL, said(0.5, 0.5))
    taken = sample.take()
    assert isinstance(taken, SampledImage)
    assert (int(taken.pixels[0, 0, 0]), taken.subnetwork) == (1, SMALL)
    assert sample.take() is None
    assert (sample.num_answered, sample.num_failed) == (2, 0)


def test_only_the_latest_images_are_kept() -> None:
    sample = LiveSample()
    for value in range(KEPT_IMAGES + 5):
        sample.answered([image(value)], SMALL, said(0.5))
    kept = []
    while (taken := sample.take()) is not None:
        kept.append(int(taken.pixels[0, 0, 0]))
    assert kept == list(range(5, KEPT_IMAGES + 5))


def test_nan_answers_and_errors_count_as_failures() -> None:
    sample = LiveSample()
    sample.answered([image(1), image(2)], SMALL, said(float("nan"), 0.5))
    sample.failed()
    assert (sample.num_answered, sample.num_failed) == (1, 2)


def test_the_shapes_of_the_last_batches_are_listed_most_frequent_first() -> None:
    sample, large = LiveSample(), SubNetwork(4, 1.0)
    sample.answered([image(1)], large, said(0.5))
    for _ in range(2):
        sample.answered([image(1), image(2)], SMALL, said(0.5, 0.5))
    assert sample.shapes() == [(SMALL, 2), (large, 1)]
    for _ in range(KEPT_SHAPES):
        sample.answered([image(1)], SMALL, said(0.5))
    assert sample.shapes() == [(SMALL, 1)]
