import math

import pytest
import torch

from models.calibration import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    expected_calibration_error,
    fit_temperature,
)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_of_two_classes_follows_from_how_often_the_likelier_one_is_right(temperature: float) -> None:
    """Logits 1 and 0, right three times of four; with one that may be either, softmax must say 3.5 / 5 = 7 / 10."""
    logits = torch.tensor([[1.0, 0.0]] * 4) * temperature
    fitted = fit_temperature(logits, torch.tensor([0, 0, 1, 0]))
    assert fitted == pytest.approx(temperature / math.log(7 / 3), rel=1e-6)


def test_the_temperature_gives_the_labels_the_highest_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 10, generator=generator) * 3
    labels = (logits / 2.2).softmax(dim=1).multinomial(1, generator=generator)[:, 0]

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(2.2, rel=0.15)
    assert loss(fitted) <= min(loss(fitted * 1.01), loss(fitted / 1.01))


def test_never_to_be_wrong_is_trusted_the_more_images_there_are() -> None:
    """With n images and one that may be either, softmax must say (n + 0.5) / (n + 1)."""
    for count in (2, 20, 2000):
        logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * (count // 2))
        odds = (count + 0.5) / 0.5
        fitted = fit_temperature(logits, logits.argmax(dim=1))
        assert fitted == pytest.approx(1 / math.log(odds), rel=1e-6)


def test_temperatures_stay_within_bounds() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(HIGHEST_TEMPERATURE)
    assert fit_temperature(logits / 100, torch.tensor([0, 1])) == pytest.approx(LOWEST_TEMPERATURE)


def test_the_error_is_the_gap_of_each_bin_weighted_by_its_share() -> None:
    # 0.91 and 0.92 share a bin, of which half is right; 0.55 is right; 1.0 falls into the last bin and is wrong.
    confidences = torch.tensor([0.91, 0.92, 0.55, 1.0])
    correct = torch.tensor([True, False, True, False])
    expected = (abs(0.91 + 0.92 - 1) + abs(0.55 - 1) + 1.0) / 4
    assert expected_calibration_error(confidences, correct) == pytest.approx(expected, rel=1e-6)


def test_errors_of_either_sign_cancel_within_a_bin_alone() -> None:
    confidences = torch.tensor([0.5, 0.5, 0.8, 0.8])
    assert expected_calibration_error(confidences, torch.tensor([True, False, True, True])) == pytest.approx(0.1)
    assert expected_calibration_error(confidences[:2], torch.tensor([True, False])) == 0
