import math

import pytest
import torch

from models.evaluation.calibration import (
    HIGHEST_EXPONENT,
    HIGHEST_TEMPERATURE,
    LOWEST_EXPONENT,
    LOWEST_TEMPERATURE,
    Scaling,
    expected_calibration_error,
    fit_scaling,
)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
def test_answers_of_equal_confidence_are_calibrated_to_their_smoothed_accuracy(spread: float) -> None:
    """Logits 1 and 0 are right in three of four images; one more counts as half right, so 3.5 / 5 = 0.7 is fitted."""
    logits = torch.tensor([[1.0, 0.0]] * 4) * spread
    fitted = fit_scaling(logits, torch.tensor([0, 0, 1, 0]))
    assert fitted.probabilities(logits)[0].tolist() == pytest.approx([0.7, 0.3], rel=1e-4)


@pytest.mark.parametrize("true", [Scaling(2.2, 0.01), Scaling(1.2, 0.3), Scaling(0.7, 0.1)])
def test_the_scaling_that_the_labels_were_drawn_from_is_recovered(true: Scaling) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 10, generator=generator) * torch.rand(20_000, 1, generator=generator) * 6
    labels = true.probabilities(logits).multinomial(1, generator=generator)[:, 0]
    fitted = fit_scaling(logits, labels)
    assert fitted.temperature == pytest.approx(true.temperature, rel=0.1)
    assert fitted.entropy_exponent == pytest.approx(true.entropy_exponent, abs=0.05)
    best, confidences = logits.argmax(dim=1), fitted.probabilities(logits).max(dim=1).values
    assert expected_calibration_error(confidences, best == labels) < 0.02


def test_one_scaling_can_raise_high_confidences_and_lower_low_ones() -> None:
    """Of answers at 0.97, 0.99 are right, of those at 0.7, 0.6: no temperature alone corrects both."""
    sure, unsure = [math.log(97 / 3), 0.0], [math.log(7 / 3), 0.0]
    logits = torch.tensor([sure] * 1000 + [unsure] * 1000)
    labels = torch.tensor([0] * 990 + [1] * 10 + [0] * 600 + [1] * 400)
    mended = fit_scaling(logits, labels).probabilities(logits)[[0, -1], 0]
    assert mended.tolist() == pytest.approx([0.99, 0.6], abs=1e-3)


def test_scaling_keeps_the_order_of_the_classes_and_is_the_softmax_by_default() -> None:
    logits = torch.tensor([[3.0, -1.0, 2.5, 0.0], [0.0, 0.0, 0.1, -1000.0]])
    torch.testing.assert_close(Scaling().probabilities(logits), logits.softmax(dim=1))
    for scaling in (Scaling(0.5, 0.3), Scaling(2.0, 1.0)):
        probabilities = scaling.probabilities(logits)
        assert probabilities.argsort(dim=1, stable=True).tolist() == logits.argsort(dim=1, stable=True).tolist()
        assert probabilities.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_a_certain_answer_is_scaled_without_becoming_nan() -> None:
    for logits in ([1000.0, 0.0], [1e38, -1e38], [0.0, -math.inf]):
        assert Scaling(0.05, 1.0).probabilities(torch.tensor([logits])).tolist() == [[1.0, 0.0]]


def test_the_confidence_of_answers_that_are_always_right_grows_with_the_number_of_images() -> None:
    """With n images that are right and one more that counts as half right, (n + 0.5) / (n + 1) is fitted."""
    for count in (2, 20, 2000):
        logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * (count // 2))
        fitted = fit_scaling(logits, logits.argmax(dim=1))
        assert fitted.probabilities(logits)[0, 0].item() == pytest.approx((count + 0.5) / (count + 1), abs=1e-4)


def test_scalings_stay_within_bounds() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert fit_scaling(logits, torch.tensor([1, 0])).temperature == pytest.approx(HIGHEST_TEMPERATURE, rel=0.05)
    assert fit_scaling(logits / 1000, torch.tensor([0, 1])).temperature == pytest.approx(LOWEST_TEMPERATURE, rel=0.05)
    for given in (logits, logits * 0, logits * 1e6, logits / 1e6):
        fitted = fit_scaling(given, torch.tensor([0, 1]))
        assert LOWEST_TEMPERATURE <= fitted.temperature <= HIGHEST_TEMPERATURE
        assert LOWEST_EXPONENT <= fitted.entropy_exponent <= HIGHEST_EXPONENT


def test_nan_logits_give_the_default_scaling() -> None:
    assert fit_scaling(torch.full((3, 2), math.nan), torch.tensor([0, 1, 0])) == Scaling()


def test_the_calibration_error_is_the_gap_of_each_bin_weighted_by_its_share() -> None:
    # 0.91 and 0.92 share a bin, of which half is right; 0.55 is right; 1.0 falls into the last bin and is wrong.
    confidences = torch.tensor([0.91, 0.92, 0.55, 1.0])
    correct = torch.tensor([True, False, True, False])
    expected = (abs(0.91 + 0.92 - 1) + abs(0.55 - 1) + 1.0) / 4
    assert expected_calibration_error(confidences, correct) == pytest.approx(expected, rel=1e-6)


def test_errors_of_opposite_sign_cancel_only_within_a_bin() -> None:
    confidences = torch.tensor([0.5, 0.5, 0.8, 0.8])
    assert expected_calibration_error(confidences, torch.tensor([True, False, True, True])) == pytest.approx(0.1)
    assert expected_calibration_error(confidences[:2], torch.tensor([True, False])) == 0
