import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from models.checkpoint import CheckpointMismatchError, UnreadableCheckpointError
from models.objective import PairChoice, PairLoss, Teacher, sample_pairs, training_step
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT

PAIRS = (PairChoice(4, 0.7), PairChoice(2, 0.5))
FULL_PRECISION = torch.autocast("cpu", torch.bfloat16, enabled=False)


def test_pairs_follow_from_seed_and_step_alone(tiny_config: SuperViTConfig) -> None:
    first = [sample_pairs(tiny_config, 3, step) for step in range(50)]
    torch.manual_seed(99)
    assert first == [sample_pairs(tiny_config, 3, step) for step in range(50)]
    assert first != [sample_pairs(tiny_config, 4, step) for step in range(50)]


def test_pairs_cover_the_family_and_the_largest_grid_comes_first() -> None:
    config = SuperViTConfig()
    pairs = [sample_pairs(config, 0, step) for step in range(500)]
    assert {pair.patch_grid for pair, _ in pairs} == {14}
    assert {pair.keep_rate for pair, _ in pairs} == {0.5, 0.7}
    drawn = [(pair.patch_grid, pair.keep_rate) for _, pair in pairs]
    for choice in [(grid, rate) for grid in (8, 10, 12) for rate in (0.5, 0.7)]:
        assert 50 < drawn.count(choice) < 120  # 83 of 500 on average
    assert len(set(drawn)) == 6


def test_a_family_of_one_trains_with_itself(tiny_config: SuperViTConfig) -> None:
    lone = replace(tiny_config, patch_grids=(4,), keep_rates=(1.0,))
    assert sample_pairs(lone, 0, 0) == (PairChoice(4, 1.0), PairChoice(4, 1.0))


class Answers(SuperViT):
    """A model whose logits for the two of a pair are set by hand."""

    def __init__(self, config: SuperViTConfig, full: Tensor, pruned: Tensor) -> None:
        super().__init__(config)
        self.full, self.pruned = full.requires_grad_(), pruned.requires_grad_()

    def forward_pair(self, images: Tensor, patch_grid: int, keep_rate: float) -> tuple[Tensor, Tensor]:
        del images, patch_grid, keep_rate
        return self.full, self.pruned


@pytest.fixture
def answers(tiny_config: SuperViTConfig) -> Answers:
    # Softmax of the whole: 1/4, 1/4, 1/2 and 1/3, 1/3, 1/3. Of the pruned: 1/2, 1/4, 1/4 and 1/5, 3/5, 1/5.
    full = torch.tensor([[0.0, 0.0, math.log(2)], [1.0, 1.0, 1.0]])
    pruned = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, math.log(3), 0.0]])
    return Answers(replace(tiny_config, depth=1, prune_blocks=()), full, pruned)


# Mean over both images of sum p log(p / q), p of the whole and q of the pruned.
KL = ((1 / 4 * math.log(1 / 2) + 0 + 1 / 2 * math.log(2)) + (2 / 3 * math.log(5 / 3) + 1 / 3 * math.log(5 / 9))) / 2


def test_the_whole_learns_labels_and_the_pruned_learns_the_whole(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.5)
    classification, distillation = loss(torch.empty(2, 0), torch.tensor([2, 0]), None, PAIRS[0])
    assert classification.item() == pytest.approx((math.log(2) + math.log(3)) / 2)
    assert distillation.item() == pytest.approx(KL)


def test_label_smoothing_spreads_its_mass_over_all_classes(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.3, teacher_weight=0.5)
    classification, _ = loss(torch.empty(2, 0), torch.tensor([2, 0]), None, PAIRS[0])
    first = 0.8 * math.log(2) + 0.2 * math.log(4)
    assert classification.item() == pytest.approx((first + math.log(3)) / 2)


def test_mixed_labels_are_not_smoothed_again(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.3, teacher_weight=0.5)
    targets = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.2, 0.6]])
    classification, _ = loss(torch.empty(2, 0), targets, None, PAIRS[0])
    assert classification.item() == pytest.approx((0.5 * math.log(4) + 0.5 * math.log(2) + math.log(3)) / 2)


def test_a_teacher_takes_its_share_of_the_classification_loss(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.25)
    taught = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    classification, distillation = loss(torch.empty(2, 0), torch.tensor([2, 0]), taught, PAIRS[0])
    labels = (math.log(2) + math.log(3)) / 2
    divergence = (0.5 * math.log(2) + 0.25 * math.log(1 / 2)) / 2
    assert classification.item() == pytest.approx(0.75 * labels + 0.25 * divergence)
    assert distillation.item() == pytest.approx(KL)


def test_distillation_sends_no_gradient_to_the_whole(answers: Answers) -> None:
    loss = PairLoss(answers, label_smoothing=0.0, teacher_weight=0.5)
    classification, distillation = loss(torch.empty(2, 0), torch.tensor([2, 0]), None, PAIRS[0])
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
        whole = separate(images, SubNetwork(pair.patch_grid, 1.0))
        expected[name] = functional.cross_entropy(whole, labels, label_smoothing=0.1)
        pruned = separate(images, SubNetwork(pair.patch_grid, pair.keep_rate)).log_softmax(dim=1)
        divergence = functional.kl_div(pruned, whole.detach().softmax(dim=1), reduction="batchmean")
        expected[f"{name}, pruned"] = divergence
    for loss in expected.values():
        torch.autograd.backward(loss, retain_graph=True)
    before = copy.deepcopy(deit.state_dict())
    optimizer = torch.optim.SGD(deit.parameters(), lr=0.1)
    for parameter in deit.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # of an earlier step
    pair_loss = PairLoss(deit.train(), label_smoothing=0.1, teacher_weight=0.5)
    losses = training_step(pair_loss, optimizer, images, labels, None, PAIRS, FULL_PRECISION)
    assert losses == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    for (name, parameter), reference in zip(deit.named_parameters(), separate.parameters(), strict=True):
        if reference.grad is None:
            assert name == "pos_embed_list.1"  # grid 3 took no part
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parameter, before[name] - 0.1 * reference.grad, atol=1e-5, rtol=1e-4)


def test_a_step_in_bfloat16_stays_close_to_full_precision(deit: SuperViT, images: Tensor, labels: Tensor) -> None:
    answers = []
    for enabled in (False, True):
        model = copy.deepcopy(deit).train()
        loss = PairLoss(model, label_smoothing=0.1, teacher_weight=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        answers.append(training_step(loss, optimizer, images, labels, None, PAIRS, autocast))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert answers[1] == pytest.approx(answers[0], rel=0.2, abs=0.05)
    assert answers[1] != answers[0]


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    path = tmp_path / "teacher.pth"
    network = timm.create_model("test_vit", num_classes=3)
    torch.save({"model": network.state_dict()}, path)
    return path


def test_a_teacher_sees_the_same_pictures_at_its_own_size_and_normalisation(
    teacher_file: Path, tiny_config: SuperViTConfig
) -> None:
    config = replace(tiny_config, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    teacher = Teacher("test_vit", teacher_file, config)
    network = timm.create_model("test_vit", num_classes=3).eval()
    network.load_state_dict(torch.load(teacher_file, weights_only=True)["model"])
    data = timm.data.resolve_model_data_config(network)
    side = data["input_size"][-1]

    def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = network(normalised(pixels, data["mean"], data["std"])).softmax(dim=1)
    taught = teacher(normalised(pixels, config.mean, config.std))
    torch.testing.assert_close(taught, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(teacher(torch.zeros(5, 3, 16, 16)).sum(dim=1), torch.ones(5))


def test_a_teacher_is_frozen(teacher_file: Path, tiny_config: SuperViTConfig) -> None:
    teacher = Teacher("test_vit", teacher_file, tiny_config)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.zeros(1, 3, 16, 16, requires_grad=True)).requires_grad


def test_weights_that_are_not_the_teachers_are_a_checkpoint_error(
    teacher_file: Path, tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"teacher\.pth: not weights of test_vit2"):
        Teacher("test_vit2", teacher_file, tiny_config)
    with pytest.raises(CheckpointMismatchError, match=r"teacher\.pth: not weights of test_vit"):
        Teacher("test_vit", teacher_file, replace(tiny_config, num_classes=4))
    with pytest.raises(UnreadableCheckpointError, match="absent"):
        Teacher("test_vit", tmp_path / "absent", tiny_config)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what timm was asked to download, none of which can be had."""
    asked: list[str] = []

    def fail(name: str, pretrained: bool) -> None:
        assert pretrained
        asked.append(name)
        raise FileNotFoundError("no connection,\nno cache")

    monkeypatch.setattr(timm, "create_model", fail)
    return asked


def test_a_downloaded_teacher_must_know_the_classes_of_the_data(
    tiny_config: SuperViTConfig, downloads: list[str]
) -> None:
    """With another number of classes timm gives it a random head, and says nothing."""
    complaint = "test_vit: timm's weights know 1000 classes and the data 3; give --teacher-checkpoint"
    with pytest.raises(CheckpointMismatchError, match=complaint):
        Teacher("test_vit", None, tiny_config)
    assert downloads == []


@pytest.mark.parametrize("name", ["test_vit", "test_vit.no_such_tag", "supervit_lvvit_micro_patch4_32"])
def test_a_teacher_that_cannot_be_downloaded_is_a_checkpoint_error_of_one_line(
    name: str, tiny_config: SuperViTConfig, downloads: list[str]
) -> None:
    with pytest.raises(UnreadableCheckpointError) as caught:
        Teacher(name, None, replace(tiny_config, num_classes=1000))
    assert str(caught.value).startswith(f"{name}: timm's weights cannot be had: ")
    assert "\n" not in str(caught.value)
    assert downloads == ["test_vit"][: name == "test_vit"]


def test_the_loss_is_the_same_in_both_flavours_of_input(build: Callable[[SuperViTConfig], SuperViT]) -> None:
    """Class indices with smoothing and the probabilities that they stand for give one loss."""
    config = SuperViTConfig(
        width=8, depth=1, num_heads=2, patch_kernel=4, patch_grids=(2,), prune_blocks=(), num_classes=4
    )
    loss = PairLoss(build(config), label_smoothing=0.2, teacher_weight=0.5)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    indices = torch.tensor([0, 3, 1])
    probabilities = functional.one_hot(indices, 4) * 0.8 + 0.05
    by_index, by_probability = (
        loss(images, targets, None, PairChoice(2, 0.5))[0] for targets in (indices, probabilities)
    )
    torch.testing.assert_close(by_index, by_probability)
