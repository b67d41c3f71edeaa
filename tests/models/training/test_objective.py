import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.mix_token import TokenBox, TokenExchange
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from models.training.objective import (
    Batch,
    Learner,
    PairChoice,
    PairLoss,
    Targets,
    sample_pairs,
    sample_single,
    training_step,
)

PAIRS = (PairChoice(4, 1.0, 0.7), PairChoice(2, 1.0, 0.5))
FULL_PRECISION = torch.autocast("cpu", torch.bfloat16, enabled=False)


def test_pairs_depend_only_on_seed_and_step(tiny_config: SuperViTConfig) -> None:
    first = [sample_pairs(tiny_config, 3, step) for step in range(50)]
    torch.manual_seed(99)
    assert first == [sample_pairs(tiny_config, 3, step) for step in range(50)]
    assert first != [sample_pairs(tiny_config, 4, step) for step in range(50)]


def test_pairs_cover_all_grids_and_keep_rates_and_the_largest_grid_comes_first() -> None:
    config = SuperViTConfig()
    pairs = [sample_pairs(config, 0, step) for step in range(500)]
    assert {pair.patch_grid for pair, _ in pairs} == {14}
    assert {pair.pruned_keep_rate for pair, _ in pairs} == {0.5, 0.7}
    assert {pair.keep_rate for both in pairs for pair in both} == {1}
    drawn = [(pair.patch_grid, pair.pruned_keep_rate) for _, pair in pairs]
    for choice in [(grid, rate) for grid in (8, 10, 12) for rate in (0.5, 0.7)]:
        assert 50 < drawn.count(choice) < 120  # 83 of 500 on average
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_a_family_of_one_subnetwork_trains_it_without_distillation(tiny_config: SuperViTConfig, rate: float) -> None:
    lone = replace(tiny_config, patch_grids=(4,), keep_rates=(rate,))
    assert sample_pairs(lone, 0, 0) == (PairChoice(4, rate, None),)


def test_a_family_without_pruning_trains_two_grids_per_step(tiny_config: SuperViTConfig) -> None:
    largest, smaller = sample_pairs(replace(tiny_config, keep_rates=(1.0,)), 0, 0)
    assert largest == PairChoice(4, 1.0, None)
    assert smaller in (PairChoice(2, 1.0, None), PairChoice(3, 1.0, None))


def test_sample_single_draws_any_grid_unpruned(tiny_config: SuperViTConfig) -> None:
    drawn = [sample_single(tiny_config, 0, step, pruned=False) for step in range(300)]
    assert drawn == [sample_single(tiny_config, 0, step, pruned=False) for step in range(300)]
    for grid in (2, 3, 4):
        assert 70 < drawn.count((PairChoice(grid, 1.0, None),)) < 130


def test_sample_single_with_pruning_draws_any_subnetwork(tiny_config: SuperViTConfig) -> None:
    drawn = [sample_single(tiny_config, 0, step, pruned=True) for step in range(900)]
    assert len(set(drawn)) == len(tiny_config.subnetworks)
    for subnetwork in tiny_config.subnetworks:
        assert 60 < drawn.count((PairChoice(subnetwork.patch_grid, subnetwork.keep_rate, None),)) < 140


class Answers(SuperViT):
    """A model whose logits for the two sub-networks of a pair are set by hand."""

    def __init__(self, config: SuperViTConfig, full: Tensor, pruned: Tensor) -> None:
        super().__init__(config)
        self.full, self.pruned = full.requires_grad_(), pruned.requires_grad_()

    def forward_rates(
        self, images: Tensor, patch_grid: int, keep_rates: tuple[float, ...], exchange: TokenExchange | None = None
    ) -> tuple[Tensor, ...]:
        del images, patch_grid, exchange
        return (self.full[:, None], self.pruned[:, None])[: len(keep_rates)]

    def classify(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


@pytest.fixture
def answers(tiny_config: SuperViTConfig) -> Answers:
    # Softmax of the unpruned: 1/4, 1/4, 1/2 and 1/3, 1/3, 1/3. Of the pruned: 1/2, 1/4, 1/4 and 1/5, 3/5, 1/5.
    full = torch.tensor([[0.0, 0.0, math.log(2)], [1.0, 1.0, 1.0]])
    pruned = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, math.log(3), 0.0]])
    return Answers(replace(tiny_config, depth=1, prune_blocks=()), full, pruned)


# Mean over both images of sum p log(p / q), p of the unpruned and q of the pruned sub-network.
KL = ((1 / 4 * math.log(1 / 2) + 0 + 1 / 2 * math.log(2)) + (2 / 3 * math.log(5 / 3) + 1 / 3 * math.log(5 / 9))) / 2


def test_the_unpruned_subnetwork_learns_the_labels_and_the_pruned_one_learns_from_it(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.5)
    (classification, distillation), _ = loss(torch.empty(2, 0), Targets(torch.tensor([2, 0])), PAIRS[0])
    assert classification.item() == pytest.approx((math.log(2) + math.log(3)) / 2)
    assert distillation.item() == pytest.approx(KL)


def test_without_a_lower_keep_rate_there_is_only_the_classification_loss(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.5)
    (classification,), _ = loss(torch.empty(2, 0), Targets(torch.tensor([2, 0])), PairChoice(4, 1.0, None))
    assert classification.item() == pytest.approx((math.log(2) + math.log(3)) / 2)


def test_label_smoothing_spreads_its_mass_over_all_classes(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.3, teacher_weight=0.5)
    (classification, _), _ = loss(torch.empty(2, 0), Targets(torch.tensor([2, 0])), PAIRS[0])
    first = 0.8 * math.log(2) + 0.2 * math.log(4)
    assert classification.item() == pytest.approx((first + math.log(3)) / 2)


def test_mixed_labels_are_not_smoothed_again(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.3, teacher_weight=0.5)
    targets = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.2, 0.6]])
    (classification, _), _ = loss(torch.empty(2, 0), Targets(targets), PAIRS[0])
    assert classification.item() == pytest.approx((0.5 * math.log(4) + 0.5 * math.log(2) + math.log(3)) / 2)


def test_a_teacher_contributes_its_weight_to_the_classification_loss(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.25)
    teacher_probs = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    (classification, distillation), _ = loss(torch.empty(2, 0), Targets(torch.tensor([2, 0]), teacher_probs), PAIRS[0])
    labels = (math.log(2) + math.log(3)) / 2
    divergence = (0.5 * math.log(2) + 0.25 * math.log(1 / 2)) / 2
    assert classification.item() == pytest.approx(0.75 * labels + 0.25 * divergence)
    assert distillation.item() == pytest.approx(KL)


def test_labels_and_teacher_probabilities_are_mixed_like_the_tokens(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.25)
    quarter = TokenBox(4, 0, 2, 0, 2).exchange_on(4, torch.device("cpu"))
    teacher_probs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    (classification, _), _ = loss(torch.empty(2, 0), Targets(torch.tensor([2, 0]), teacher_probs), PAIRS[0], quarter)
    labels = (0.75 * math.log(2) + 0.25 * math.log(4) + math.log(3)) / 2
    first = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    second = 0.25 * math.log(0.25 * 3) + 0.75 * math.log(0.75 * 3)
    assert classification.item() == pytest.approx(0.75 * labels + 0.25 * (first + second) / 2)


def test_the_loss_of_patch_tokens_is_weighted_and_applies_only_to_the_largest_grid(
    tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT], images: Tensor, labels: Tensor
) -> None:
    model = build(replace(tiny_config, flavour="lvvit")).train()
    tokens = functional.one_hot(torch.arange(64).view(4, 16) % 3, 3).float()

    def whole(weight: float, grid: int) -> float:
        pair = PairChoice(grid, 1.0, None)
        ((loss,), _) = PairLoss(model, 0.1, 0.5, weight)(images, Targets(labels, tokens=tokens), pair)
        return float(loss.detach())

    (last,) = model.forward_rates(images, 4, (1.0,))
    outputs = model.get_submodule("aux_head")(model.norm(last)[:, 1:])
    expected = functional.cross_entropy(outputs.transpose(1, 2), tokens.argmax(2))
    assert whole(3.0, 4) - whole(1.0, 4) == pytest.approx(2 * expected.item(), rel=1e-4)
    assert whole(3.0, 3) == whole(1.0, 3)


def test_distillation_sends_no_gradient_to_the_unpruned_subnetwork(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.5)
    (classification, distillation), _ = loss(torch.empty(2, 0), Targets(torch.tensor([2, 0])), PAIRS[0])
    to_full, to_pruned = torch.autograd.grad(distillation, (answers.full, answers.pruned), allow_unused=True)
    assert to_full is None
    pruned, whole = answers.pruned.softmax(dim=1), answers.full.softmax(dim=1)
    torch.testing.assert_close(to_pruned, (pruned - whole) / 2)
    to_full, to_pruned = torch.autograd.grad(classification, (answers.full, answers.pruned), allow_unused=True)
    assert to_full is not None
    assert to_pruned is None


def test_a_step_sums_the_gradients_of_four_separate_subnetworks(deit: SuperViT, images: Tensor, labels: Tensor) -> None:
    separate = copy.deepcopy(deit).train()
    expected = {}
    for name, pair in zip(("largest grid", "smaller grid"), PAIRS, strict=True):
        assert pair.pruned_keep_rate
        whole = separate(images, SubNetwork(pair.patch_grid, 1.0))
        expected[name] = functional.cross_entropy(whole, labels, label_smoothing=0.1)
        pruned = separate(images, SubNetwork(pair.patch_grid, pair.pruned_keep_rate)).log_softmax(dim=1)
        divergence = functional.kl_div(pruned, whole.detach().softmax(dim=1), reduction="batchmean")
        expected[f"{name}, pruned"] = divergence
    for loss in expected.values():
        torch.autograd.backward(loss, retain_graph=True)
    before = copy.deepcopy(deit.state_dict())
    optimizer = torch.optim.SGD(deit.parameters(), lr=0.1)
    for parameter in deit.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # of an earlier step
    pair_loss = PairLoss(deit.train(), label_smoothing=0.1, teacher_weight=0.5)
    learner = Learner(pair_loss, optimizer, FULL_PRECISION)
    losses = training_step(learner, Batch(images, Targets(labels), PAIRS))
    assert losses == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    for (name, parameter), reference in zip(deit.named_parameters(), separate.parameters(), strict=True):
        if reference.grad is None:
            assert name == "pos_embed_list.1"  # grid 3 took no part
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parameter, before[name] - 0.1 * reference.grad, atol=1e-5, rtol=1e-4)


def test_a_step_of_one_pair_returns_only_its_losses(deit: SuperViT, images: Tensor, labels: Tensor) -> None:
    pair_loss = PairLoss(deit.train(), label_smoothing=0.1, teacher_weight=0.5)
    learner = Learner(pair_loss, torch.optim.SGD(deit.parameters(), lr=0.1), FULL_PRECISION)
    single, pair = (PairChoice(3, 1.0, None),), (PairChoice(3, 1.0, 0.5),)
    assert list(training_step(learner, Batch(images, Targets(labels), single))) == ["single grid"]
    assert deit.pos_embed_list[1].grad is not None
    losses = training_step(learner, Batch(images, Targets(labels), pair))
    assert list(losses) == ["single grid", "single grid, pruned"]


def steps_of(
    model: SuperViT,
    images: Tensor,
    labels: Tensor,
    count: int,
    autocast: torch.autocast = FULL_PRECISION,
    **options: Any,  # noqa: ANN401 - scaler and clip_grad
) -> tuple[SuperViT, list[dict[str, float]]]:
    """Take one step on the images in `count` batches with a copy of the model."""
    moved = copy.deepcopy(model).train()
    pair_loss = PairLoss(moved, label_smoothing=0.1, teacher_weight=0.5)
    learner = Learner(pair_loss, torch.optim.SGD(moved.parameters(), lr=0.1), autocast, **options)
    losses = [
        training_step(learner, Batch(some, Targets(theirs), PAIRS, number=number, count=count))
        for number, (some, theirs) in enumerate(zip(images.chunk(count), labels.chunk(count), strict=True), start=1)
    ]
    return moved, losses


def change(moved: SuperViT, start: SuperViT) -> Tensor:
    """Return how far the weights moved, as one vector."""
    pairs = zip(moved.parameters(), start.parameters(), strict=True)
    return torch.cat([(after - before).flatten() for after, before in pairs])


def test_accumulated_batches_give_the_step_of_one_large_batch(deit: SuperViT, images: Tensor, labels: Tensor) -> None:
    whole, (expected,) = steps_of(deit, images, labels, 1)
    parts, losses = steps_of(deit, images, labels, 2)
    torch.testing.assert_close(change(parts, deit), change(whole, deit), atol=1e-6, rtol=1e-4)
    for name, loss in expected.items():  # each batch returns its own mean
        assert (losses[0][name] + losses[1][name]) / 2 == pytest.approx(loss, rel=1e-5)


def test_weights_do_not_change_before_the_last_batch_of_a_step(deit: SuperViT, images: Tensor, labels: Tensor) -> None:
    model = copy.deepcopy(deit).train()
    pair_loss = PairLoss(model, label_smoothing=0.1, teacher_weight=0.5)
    learner = Learner(pair_loss, torch.optim.SGD(model.parameters(), lr=0.1), FULL_PRECISION)
    training_step(learner, Batch(images, Targets(labels), PAIRS, number=1, count=2))
    assert not change(model, deit).any()


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_gradient_above_the_clip_norm_is_scaled_down_to_it(
    deit: SuperViT, images: Tensor, labels: Tensor, is_scaled: bool
) -> None:
    free, _ = steps_of(deit, images, labels, 1)
    norm = change(free, deit).norm().item() / 0.1  # SGD's learning rate
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if is_scaled else None
    clipped, _ = steps_of(deit, images, labels, 1, clip_grad=norm / 4, scaler=scaler)
    torch.testing.assert_close(change(clipped, deit), change(free, deit) / 4, atol=1e-6, rtol=1e-3)
    unchanged, _ = steps_of(deit, images, labels, 1, clip_grad=norm * 4, scaler=scaler)
    torch.testing.assert_close(change(unchanged, deit), change(free, deit), atol=1e-6, rtol=1e-3)


def test_a_scaled_gradient_that_overflows_changes_no_weights_and_lowers_the_scale(
    deit: SuperViT, images: Tensor, labels: Tensor
) -> None:
    float16 = torch.autocast("cpu", torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # float16 ends at 65504
    moved, _ = steps_of(deit, images, labels, 1, float16, scaler=scaler)
    assert not change(moved, deit).any()
    assert scaler.get_scale() == 2**23


def test_a_step_in_float16_stays_close_to_full_precision(deit: SuperViT, images: Tensor, labels: Tensor) -> None:
    float16 = torch.autocast("cpu", torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    (moved, losses), (expected, exact) = (
        steps_of(deit, images, labels, 1, float16, scaler=scaler),
        steps_of(deit, images, labels, 1),
    )
    assert losses[0] == pytest.approx(exact[0], rel=0.02, abs=0.01)
    assert losses != exact
    difference = (change(moved, deit) - change(expected, deit)).norm() / change(expected, deit).norm()
    assert difference < 0.1


def test_a_step_in_bfloat16_stays_close_to_full_precision(deit: SuperViT, images: Tensor, labels: Tensor) -> None:
    answers = []
    for enabled in (False, True):
        model = copy.deepcopy(deit).train()
        loss = PairLoss(model, label_smoothing=0.1, teacher_weight=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        answers.append(training_step(Learner(loss, optimizer, autocast), Batch(images, Targets(labels), PAIRS)))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert answers[1] == pytest.approx(answers[0], rel=0.2, abs=0.05)
    assert answers[1] != answers[0]


def test_class_indices_and_their_smoothed_probabilities_give_the_same_loss(
    build: Callable[[SuperViTConfig], SuperViT],
) -> None:
    """The class indices are smoothed by the loss, the probabilities beforehand."""
    config = SuperViTConfig(
        width=8, depth=1, num_heads=2, patch_kernel=4, patch_grids=(2,), prune_blocks=(), num_classes=4
    )
    loss = PairLoss(build(config), label_smoothing=0.2, teacher_weight=0.5)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    indices = torch.tensor([0, 3, 1])
    probabilities = functional.one_hot(indices, 4) * 0.8 + 0.05
    by_index, by_probability = (
        loss(images, Targets(targets), PairChoice(2, 1.0, 0.5))[0][0] for targets in (indices, probabilities)
    )
    torch.testing.assert_close(by_index, by_probability)
