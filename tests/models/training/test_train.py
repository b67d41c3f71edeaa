import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import distributed

from models.checkpoint import load_checkpoint, read_weights, save_checkpoint
from models.data.datasets import open_folder
from models.data.images import evaluation_transform
from models.data.loaders import SampleLoader
from models.errors import DataError, DeviceError
from models.evaluation.calibration import Scaling
from models.evaluation.judging import make_answer, measure_accuracy
from models.files.checkpoint_errors import CheckpointError
from models.header import Header
from models.mix_token import draw_box
from models.processes import ALONE, Process, seed_everything
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from models.training.batches import TARGETS_NAME
from models.training.objective import Batch, Learner, Step, Targets, sample_pairs, training_step
from models.training.recipe import Recipe
from models.training.setup import build_model, build_optimizer, build_teacher, learning_rate_schedule
from models.training.state import TrainingError, alone_in, save_atomically, version_of_state
from models.training.train import run_epochs, train
from tests.models.conftest import CLASS_NAMES
from tests.models.files.test_atomic import files_limited_to
from tests.models.training.two_processes import weights_after_three_steps

MakeRecipe = Callable[..., Recipe]
STEPS_PER_EPOCH = 6
EVERYTHING_RANDOM = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.5,
    "drop_path": 0.2,
    "augmentation_repeats": 3,
    "precision": "bfloat16",
}
LVVIT = {"model": "supervit_lvvit_micro_patch4_32", "stem_width": 4, "num_heads": 2}


def before_step(number: int, act: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    """Return a training step that applies `act`, which may raise, to the images of step `number`, counted from 1."""
    taken = 0

    def step(learner: Learner, batch: Batch) -> dict[str, float]:
        nonlocal taken
        taken += 1
        return training_step(learner, replace(batch, images=act(batch.images)) if taken == number else batch)

    return step


class Notes:
    """A training step that records its arguments, and updates the weights or not."""

    def __init__(self, *, learns: bool = True) -> None:
        self.learns = learns
        self.images: list[torch.Tensor] = []
        self.targets: list[Targets] = []
        self.pairs: list[object] = []
        self.boxes: list[object] = []
        self.places: list[tuple[int, int]] = []
        self.token_weights: list[float] = []

    def __call__(self, learner: Learner, batch: Batch) -> dict[str, float]:
        self.images.append(batch.images)
        self.targets.append(batch.targets)
        self.pairs.append(batch.pairs)
        self.boxes.append(batch.box)
        self.places.append((batch.number, batch.count))
        self.token_weights.append(getattr(learner.pair_loss, "token_weight", math.nan))
        return training_step(learner, batch) if self.learns else {"largest grid": 0.0}


def interrupt(images: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt(len(images))


def log_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_run_writes_its_checkpoint_its_state_its_log_its_curves_and_its_plot(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    output = tmp_path / "deep" / "run"
    path = train(tiny_recipe(output))
    assert path == output / "checkpoint.safetensors"
    assert {file.name for file in output.iterdir()} == {
        ".lock",
        "checkpoint.safetensors",
        "state.pt",
        "log.jsonl",
        "training.png",
        "tensorboard",
    }
    checkpoint = load_checkpoint(path)
    assert (checkpoint.name, checkpoint.class_names) == ("run", ("blue", "green", "red"))
    assert (checkpoint.config.width, checkpoint.config.patch_grids) == (16, (2, 3, 4))
    log = log_of(output)
    assert [record["epoch"] for record in log] == [1, 2, 3]
    for record in log:
        assert isinstance(record["loss"], dict)
        assert isinstance(record["top1"], dict)
        assert list(record["loss"]) == ["largest grid", "largest grid, pruned", "smaller grid", "smaller grid, pruned"]
        assert list(record["top1"]) == ["grid 2 at keep rate 0.5", "grid 4 at keep rate 1"]
        assert all(math.isfinite(value) for value in (*record["loss"].values(), *record["top1"].values()))
    with Image.open(output / "training.png") as picture:
        assert picture.format == "PNG"


def test_training_learns_to_distinguish_the_tints(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    output = tmp_path / "run"
    train(tiny_recipe(output, epochs=12, learning_rate=0.5, ema_decay=0.5))
    top1 = log_of(output)[-1]["top1"]
    assert isinstance(top1, dict)
    assert all(value >= 0.9 for value in top1.values())


def test_the_saved_weights_are_the_averaged_ones(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    path = train(tiny_recipe(tmp_path / "run", epochs=1))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    saved = read_weights(path)
    assert state["epoch"] == 1
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state["average"].items())
    assert not torch.equal(state["model"]["head.weight"], saved["head.weight"])


@pytest.mark.parametrize(
    ("options", "interrupted_at"),
    [
        ({}, STEPS_PER_EPOCH + 3),
        ({"workers": 1}, STEPS_PER_EPOCH + 1),
        (EVERYTHING_RANDOM, STEPS_PER_EPOCH + 3),
        (EVERYTHING_RANDOM | {"workers": 1}, 2 * STEPS_PER_EPOCH + 6),
        (EVERYTHING_RANDOM | LVVIT | {"drop_path": 0.0, "mix_token": True}, STEPS_PER_EPOCH + 6),
        ({"single_epochs": 2}, STEPS_PER_EPOCH + 3),
        ({"single_epochs": 1}, 2 * STEPS_PER_EPOCH + 3),
        ({"precision": "float16", "accumulate": 4, "clip_grad": 0.1}, STEPS_PER_EPOCH + 6),
    ],
    ids=[
        "plain",
        "one worker",
        "all random",
        "all random, one worker",
        "lvvit",
        "cheap epochs",
        "after cheap epochs",
        "float16, several batches a step",
    ],
)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    tmp_path: Path, tiny_recipe: MakeRecipe, options: dict[str, object], interrupted_at: int
) -> None:
    unbroken = train(tiny_recipe(tmp_path / "unbroken" / "run", **options))
    recipe = tiny_recipe(tmp_path / "broken" / "run", **options)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, before_step(interrupted_at, interrupt))
    assert len(log_of(recipe.output)) == (interrupted_at - 1) // STEPS_PER_EPOCH
    torch.manual_seed(12345)  # another process would have other generator states
    resumed = train(recipe.model_copy(update={"resume": True}))
    assert resumed.read_bytes() == unbroken.read_bytes()
    untimed = [
        [{name: value for name, value in record.items() if name != "seconds"} for record in log_of(path.parent)]
        for path in (resumed, unbroken)
    ]
    assert untimed[0] == untimed[1]


def test_a_resumed_run_is_taught_by_the_same_initial_weights_as_before(
    tmp_path: Path, tiny_recipe: MakeRecipe, foreign_file: Path
) -> None:
    """The initial weights are a file of other classes, with a head that was fitted for these classes."""
    options = {"init": foreign_file, "teacher_self": True, "teacher_weight": 1.0, "epochs": 2}
    unbroken = train(tiny_recipe(tmp_path / "unbroken" / "run", **options))
    recipe = tiny_recipe(tmp_path / "broken" / "run", **options)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, before_step(STEPS_PER_EPOCH + 2, interrupt))
    resumed = train(recipe.model_copy(update={"resume": True}))
    assert resumed.read_bytes() == unbroken.read_bytes()


@pytest.fixture
def own_data(tmp_path: Path, pictures: Path) -> Path:
    """A copy of the pictures that a test may change."""
    return shutil.copytree(pictures, tmp_path / "data")


@contextmanager
def replaced_by_a_folder(path: Path) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yield a function that replaces a file with a folder, which cannot be read or written; undo this at the end."""
    aside = path.with_name("aside")

    def replace(images: torch.Tensor) -> torch.Tensor:
        path.rename(aside)
        path.mkdir()
        return images

    yield replace
    path.rmdir()
    aside.rename(path)


@pytest.mark.parametrize(
    ("name", "epoch"), [("checkpoint.safetensors", 2), ("../../data/val/red/1.png", 2), ("log.jsonl", 3)]
)
def test_a_failure_after_an_epoch_loses_nothing_of_the_epoch(
    tmp_path: Path, tiny_recipe: MakeRecipe, own_data: Path, name: str, epoch: int
) -> None:
    """The weights or the log cannot be written, or a validation image cannot be read."""
    unbroken = train(tiny_recipe(tmp_path / "unbroken" / "run", data=own_data))
    recipe = tiny_recipe(tmp_path / "broken" / "run", data=own_data)
    recipe.output.mkdir(parents=True)
    path = (recipe.output / name).resolve()
    with replaced_by_a_folder(path) as replace, pytest.raises((OSError, DataError)):
        train(recipe, before_step((epoch - 1) * STEPS_PER_EPOCH + 1, replace))
    assert [record["epoch"] for record in log_of(recipe.output)] == list(range(1, epoch))
    notes = Notes()
    resumed = train(recipe.model_copy(update={"resume": True}), notes)
    assert len(notes.images) == (3 - epoch) * STEPS_PER_EPOCH  # a run that was trained to its end is only measured
    assert resumed.read_bytes() == unbroken.read_bytes()
    untimed = [[record | {"seconds": 0} for record in log_of(path.parent)] for path in (resumed, unbroken)]
    assert untimed[0] == untimed[1]


def test_an_epoch_whose_measurement_failed_is_measured_before_the_next_begins(
    tmp_path: Path, tiny_recipe: MakeRecipe, own_data: Path
) -> None:
    recipe = tiny_recipe(tmp_path / "run", data=own_data)
    watched = own_data / "val" / "red" / "1.png"
    with replaced_by_a_folder(watched) as replace, pytest.raises(DataError):
        train(recipe, before_step(1, replace))
    with pytest.raises(KeyboardInterrupt):
        train(recipe.model_copy(update={"resume": True}), before_step(1, interrupt))
    assert [record["epoch"] for record in log_of(recipe.output)] == [1]


def test_the_averaged_weights_are_the_ones_measured_on_validation_images(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average is made to answer blue, which a third of the images are; the weights learn all three colours."""
    update = ModelEmaV3.update

    def turn_blue(average: ModelEmaV3, model: SuperViT, step: int) -> None:
        update(average, model, step)
        average.module.head.bias.data[0] = 1e6

    monkeypatch.setattr(ModelEmaV3, "update", turn_blue)
    train(tiny_recipe(tmp_path / "run", epochs=4, learning_rate=1.0))
    top1 = log_of(tmp_path / "run")[-1]["top1"]
    assert isinstance(top1, dict)
    assert list(top1.values()) == pytest.approx([1 / 3, 1 / 3])


def test_matrix_products_are_computed_in_the_precision_of_the_recipe(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    losses = {}
    for precision in ("float32", "bfloat16", "float16"):
        train(tiny_recipe(tmp_path / precision, epochs=1, precision=precision))
        (record,) = log_of(tmp_path / precision)
        losses[precision] = record["loss"]["largest grid"]  # type: ignore[index] # read from JSON
        state = torch.load(tmp_path / precision / "state.pt", weights_only=True)
        assert (state["scaler"] is not None) == (precision == "float16")
    assert len(set(losses.values())) == 3
    assert list(losses.values()) == pytest.approx([losses["float32"]] * 3, rel=0.02)


def test_mixed_labels_are_smoothed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    notes = Notes(learns=False)
    train(tiny_recipe(tmp_path / "run", epochs=1, mixup=0.8, label_smoothing=0.3), notes)
    targets = torch.cat([targets.labels for targets in notes.targets])
    assert targets.shape == (48, 3)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(48))
    assert targets.min().item() == pytest.approx(0.3 / 3)


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[None]:
    """A process group of one, in which this process can act as any of several; the others never communicate."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("joined")
def test_processes_and_epochs_augment_the_same_images_differently_and_reproducibly(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    """Each image is picked twice, so that two processes get the same images in the same order."""
    seen = []
    for rank in (0, 1, 1):
        notes = Notes(learns=False)
        recipe = tiny_recipe(tmp_path / "run", epochs=2, augmentation_repeats=2)
        run_epochs(recipe, Process(rank, 2, ALONE.device), notes)
        labels = torch.cat([targets.labels for targets in notes.targets])
        seen.append((labels, *torch.cat(notes.images).chunk(2)))
    (labels, first, _), (same_labels, second, later), (_, again, later_again) = seen
    assert torch.equal(labels, same_labels)
    assert not torch.equal(first, second)
    assert not torch.equal(second, later)
    assert torch.equal(second, again)
    assert torch.equal(later, later_again)


@pytest.mark.usefixtures("joined")
def test_every_process_trains_on_its_own_share_of_the_images(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    shares = []
    for rank in (0, 1):
        notes = Notes(learns=False)
        run_epochs(tiny_recipe(tmp_path / "run", epochs=1), Process(rank, 2, ALONE.device), notes)
        shares.append(torch.cat([targets.labels for targets in notes.targets]))
    assert [len(share) for share in shares] == [24, 24]
    assert torch.cat(shares).bincount().tolist() == [16, 16, 16]
    assert not torch.equal(*shares)


def test_every_epoch_uses_all_images_in_an_order_of_its_own(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    notes = Notes(learns=False)
    train(tiny_recipe(tmp_path / "run", epochs=2), notes)
    seen = torch.cat([targets.labels for targets in notes.targets]).tolist()
    first, second = seen[:48], seen[48:]
    assert first != second
    assert [first.count(label) for label in range(3)] == [second.count(label) for label in range(3)] == [16, 16, 16]


def pairs_of(recipe: Recipe, steps: Iterable[int]) -> list[object]:
    """Return the sub-networks of the steps, not all equal, so that a test notices wrong step numbers."""
    config = build_model(recipe, CLASS_NAMES).config
    pairs = [sample_pairs(config, recipe.seed, step) for step in steps]
    assert len(set(pairs)) > 1
    return list(pairs)


def test_step_numbers_continue_across_epochs(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    notes, recipe = Notes(), tiny_recipe(tmp_path / "run")
    train(recipe, notes)
    assert notes.pairs == pairs_of(recipe, range(3 * STEPS_PER_EPOCH))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = learning_rate_schedule(recipe, optimizer, STEPS_PER_EPOCH, 1)
    for record in log_of(recipe.output):
        schedule.step_update(int(str(record["epoch"])) * STEPS_PER_EPOCH - 1)
        assert record["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_accumulated_batches_form_one_step_and_the_last_step_takes_the_remaining_batches(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged: list[int] = []
    update = ModelEmaV3.update

    def average(average: ModelEmaV3, model: SuperViT, step: int) -> None:
        averaged.append(step)
        update(average, model, step)

    monkeypatch.setattr(ModelEmaV3, "update", average)
    notes, recipe = Notes(), tiny_recipe(tmp_path / "run", epochs=2, accumulate=4)
    train(recipe, notes)
    assert notes.places == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)] * 2
    assert notes.pairs == pairs_of(recipe, [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
    assert averaged == [1, 2, 3, 4]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    learning_rate_schedule(recipe, optimizer, 2, 1).step_update(3)
    assert log_of(recipe.output)[-1]["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_the_learning_rate_scales_with_the_number_of_images_per_step(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    rates = []
    for options in ({"batch_size": 8}, {"batch_size": 8, "accumulate": 4}, {"batch_size": 32}):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        learning_rate_schedule(tiny_recipe(tmp_path, **options), optimizer, 100, 1).step_update(60)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[1] == rates[2] == pytest.approx(4 * rates[0])


def test_a_gradient_is_clipped_to_the_norm_of_the_recipe(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    """AdamW's first moment is a share of the gradient, so its norm is that share of the clipped gradient's norm."""
    for name, clip in (("free", None), ("clipped", 1e-3)):
        train(tiny_recipe(tmp_path / name, epochs=1, optimizer="adamw", batch_size=48, clip_grad=clip))
    norms = []
    for name in ("free", "clipped"):
        moments = torch.load(tmp_path / name / "state.pt", weights_only=True)["optimizer"]["state"].values()
        norms.append(torch.cat([moment["exp_avg"].flatten() for moment in moments]).norm().item())
    assert norms[1] == pytest.approx((1 - 0.9) * 1e-3, rel=1e-3)
    assert norms[0] > 10 * norms[1]


def test_a_convolutional_stem_trains_channels_last_and_its_checkpoint_is_contiguous(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    path = train(tiny_recipe(tmp_path / "run", epochs=1, **LVVIT))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    name = "patch_embed.conv2.weight"
    assert state["model"][name].is_contiguous(memory_format=torch.channels_last)
    saved = read_weights(path)[name]
    assert saved.is_contiguous()
    assert torch.equal(saved, state["average"][name])


def test_a_resumed_run_uses_its_new_learning_rate(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1, learning_rate=0.04))
    recipe = tiny_recipe(tmp_path / "run", epochs=2, learning_rate=0.001, resume=True)
    train(recipe)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    learning_rate_schedule(recipe, optimizer, STEPS_PER_EPOCH, 1).step_update(2 * STEPS_PER_EPOCH - 1)
    assert log_of(recipe.output)[-1]["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_few_bad_images_are_named_and_stop_neither_training_nor_validation(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    own_data: Path,
    capsys: pytest.CaptureFixture[str],
    in_memory: bool,
) -> None:
    data, vary = own_data, "" if in_memory else "rand-m9"  # RandAugment needs each image by itself
    for name in ("train/red/3.png", "val/blue/1.png", "train/green/note.txt"):
        (data / name).write_text("no picture")
    train(tiny_recipe(tmp_path / "run", data=data, epochs=2, workers=1, max_bad_images=0.1, rand_augment=vary))
    printed = capsys.readouterr().err
    assert printed.count(f"1 of 48 images of {data}/train cannot be read: red/3.png") == 1
    assert printed.count(f"1 of 12 images of {data}/val cannot be read: blue/1.png") == 1
    assert printed.count(f"{data}/train: skipped files with unsupported extensions: 1 .txt") == 1
    for record in log_of(tmp_path / "run"):
        assert isinstance(record["top1"], dict)
        assert {round(11 * top1, 6) % 1 for top1 in record["top1"].values()} == {0}


def test_single_epochs_train_one_subnetwork_per_step_before_epochs_of_pairs(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=3, single_epochs=2))
    single = ["single grid"]
    four = ["largest grid", "largest grid, pruned", "smaller grid", "smaller grid, pruned"]
    assert [list(record["loss"]) for record in log_of(tmp_path / "run")] == [single, single, four]  # type: ignore[call-overload] # read from JSON


def test_freeze_batch_norm_keeps_the_statistics_and_trains_the_stem(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    first = train(tiny_recipe(tmp_path / "first", **LVVIT))
    followed = train(tiny_recipe(tmp_path / "followed", init=first, **LVVIT))
    frozen = train(tiny_recipe(tmp_path / "frozen", init=first, freeze_batch_norm=True, **LVVIT))
    before, moved, kept = (read_weights(path) for path in (first, followed, frozen))
    for name in ("patch_embed.bn1.running_mean", "patch_embed.bn3.running_var"):
        assert not torch.equal(moved[name], before[name])
        assert torch.equal(kept[name], before[name])
    name = "patch_embed.bn1.weight"  # scale and shift are trained nevertheless
    assert not torch.equal(kept[name], before[name])


def test_a_family_of_one_subnetwork_that_fuses_is_trained_saved_and_loaded(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    path = train(tiny_recipe(tmp_path / "run", epochs=1, patch_grids=(4,), keep_rates=(0.5,), fuse_pruned=True))
    assert list(log_of(tmp_path / "run")[0]["loss"]) == ["single grid"]  # type: ignore[call-overload] # read from JSON
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.fuse_pruned
    assert [str(row.subnetwork) for row in checkpoint.profile.rows] == ["grid 4 at keep rate 0.5"]


def test_training_uses_the_saved_answers_of_a_teacher_that_was_asked_once(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    torch.manual_seed(11)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    options = {"teacher": "test_vit", "teacher_checkpoint": tmp_path / "teacher.pth", "teacher_side": 32}
    notes = Notes(learns=False)
    train(tiny_recipe(tmp_path / "run", epochs=1, teacher_once=True, **options), notes)
    assert {targets.labels.shape for targets in notes.targets} == {(8, 3)}
    kept = torch.load(tmp_path / "run" / TARGETS_NAME, weights_only=True)
    marked = torch.tensor([0.5, 0.25, 0.25]).expand(48, 3).contiguous()
    torch.save(kept | {"targets": marked}, tmp_path / "run" / TARGETS_NAME)
    later = Notes(learns=False)
    train(tiny_recipe(tmp_path / "run", epochs=2, teacher_once=True, resume=True, **options), later)
    assert torch.equal(torch.cat([targets.labels for targets in later.targets]), marked)  # the saved answers are used
    assert all(targets.teacher_probs is None for targets in notes.targets + later.targets)  # no step asks the teacher
    assert len(later.targets) == STEPS_PER_EPOCH


@pytest.mark.parametrize("mix_token", [True, False])
def test_every_step_of_an_lv_vit_gets_its_mix_token_box_and_its_token_labels(
    tmp_path: Path, tiny_recipe: MakeRecipe, mix_token: bool
) -> None:
    torch.manual_seed(11)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    notes = Notes(learns=False)
    options = {"teacher": "test_vit", "teacher_checkpoint": tmp_path / "teacher.pth", "teacher_side": 32}
    options |= {"teacher_tokens": True, "token_label_weight": 0.25, "mix_token": mix_token, "seed": 5}
    train(tiny_recipe(tmp_path / "run", epochs=1, **options, **LVVIT), notes)
    assert notes.boxes == [draw_box(4, 5, step) if mix_token else None for step in range(STEPS_PER_EPOCH)]
    assert set(notes.token_weights) == {0.25}
    assert all(targets.tokens is not None and targets.tokens.shape == (8, 16, 3) for targets in notes.targets)
    assert all(targets.teacher_probs is not None for targets in notes.targets)


def test_the_average_forgets_the_initial_weights_even_at_a_slow_decay(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(tmp_path / "run", epochs=1, learning_rate=0.5, ema_decay=0.99996)
    seed_everything(recipe.seed)
    first = build_model(recipe, CLASS_NAMES).state_dict()["head.weight"]
    train(recipe)
    state = torch.load(recipe.output / "state.pt", weights_only=True)
    last, average = state["model"]["head.weight"], state["average"]["head.weight"]
    assert (average - last).norm() < (average - first).norm()


def test_a_repeated_epoch_appears_in_the_log_once(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"epoch": 2, "loss": "of a state that was lost"}\n')
    train(tiny_recipe(tmp_path / "run", epochs=2, resume=True))
    records = log_of(tmp_path / "run")
    assert [record["epoch"] for record in records] == [1, 2]
    assert isinstance(records[1]["loss"], dict)


def test_another_seed_gives_other_weights(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    paths = [train(tiny_recipe(tmp_path / str(seed) / "run", epochs=1, seed=seed)) for seed in (0, 1)]
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_resuming_a_finished_run_does_not_change_its_checkpoint(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    path = train(tiny_recipe(tmp_path / "run", epochs=1))
    before = path.read_bytes()
    assert train(tiny_recipe(tmp_path / "run", epochs=1, resume=True)) == path
    assert path.read_bytes() == before


def test_a_run_is_never_overwritten_without_resume(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "state.pt").read_bytes()
    with pytest.raises(TrainingError, match="run: already holds a run; continue it with --resume"):
        train(tiny_recipe(tmp_path / "run"))
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_two_runs_cannot_share_a_folder(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(tmp_path / "run", epochs=1)

    def start_another(images: torch.Tensor) -> torch.Tensor:
        with pytest.raises(TrainingError, match="run: another process is training in this folder"):
            train(recipe)
        return images

    train(recipe, before_step(2, start_another))
    train(recipe.model_copy(update={"resume": True, "epochs": 2}))  # the folder is free again


def test_a_run_that_was_set_up_while_another_one_ran_and_ended_is_refused(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe(tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match="another process has trained in this folder meanwhile"):
        train_beside(recipe)
    assert len(log_of(recipe.output)) == 1


def train_beside(recipe: Recipe) -> None:
    """Set a run up, but let another one of the same recipe run to its end before the first epoch."""
    found = version_of_state(recipe.output)
    train(recipe)
    with alone_in(recipe.output, found):
        raise AssertionError("not alone")


def test_a_run_is_not_resumed_with_other_images_held_out(
    tmp_path: Path, tiny_recipe: MakeRecipe, own_data: Path
) -> None:
    shutil.rmtree(own_data / "val")
    recipe = tiny_recipe(tmp_path / "run", data=own_data, epochs=1)
    path = train(recipe)
    (own_data / "train" / "red" / "0.png").unlink()
    with pytest.raises(TrainingError, match=r"data: images were added or removed .* --init .*checkpoint\.safetensors"):
        train(recipe.model_copy(update={"resume": True, "epochs": 2}))
    assert path.exists()


def test_the_weights_of_a_finished_run_are_written_again_if_they_are_missing(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe(tmp_path / "run", epochs=1)
    before = train(recipe).read_bytes()
    (recipe.output / "checkpoint.safetensors").unlink()
    assert train(recipe.model_copy(update={"resume": True})).read_bytes() == before


def test_resuming_without_a_run_is_refused(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(TrainingError, match=r"state\.pt: nothing to resume"):
        train(tiny_recipe(tmp_path / "run", resume=True))


def test_a_run_of_another_model_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    with pytest.raises(TrainingError, match=r"state\.pt: was made with --width 16, not 32$"):
        train(tiny_recipe(tmp_path / "run", resume=True, width=32))


def test_a_run_with_mix_token_cannot_be_resumed_without_it(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1, mix_token=True, **LVVIT))
    with pytest.raises(TrainingError, match=r"state\.pt: was made with --mix-token True, not False$"):
        train(tiny_recipe(tmp_path / "run", resume=True, **LVVIT))


def test_a_run_over_renamed_classes_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe, pictures: Path) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for old, new in (("blue", "blue"), ("green", "lime"), ("red", "red")):
            (tmp_path / "data" / split / new).symlink_to(pictures / split / old, target_is_directory=True)
    with pytest.raises(TrainingError, match=r"was made with class folder green, not lime$"):
        train(tiny_recipe(tmp_path / "run", resume=True, data=tmp_path / "data"))


def test_a_damaged_log_is_refused_before_the_first_step(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    (tmp_path / "run" / "log.jsonl").write_text("{")
    with pytest.raises(TrainingError, match=r"log\.jsonl: damaged"):
        train(tiny_recipe(tmp_path / "run", resume=True), before_step(1, interrupt))


def test_a_new_run_overwrites_the_log_of_a_run_that_saved_nothing(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{")
    train(tiny_recipe(tmp_path / "run", epochs=1))
    assert [record["epoch"] for record in log_of(tmp_path / "run")] == [1]


@pytest.mark.parametrize("name", ["file/run", "x" * 300], ids=["below a file", "too long"])
def test_an_unusable_output_folder_is_refused_before_the_first_step(
    tmp_path: Path, tiny_recipe: MakeRecipe, name: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=f"{name}: not writable: "):
        train(tiny_recipe(tmp_path / name), before_step(1, interrupt))


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_a_damaged_state_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe, content: bytes) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    (tmp_path / "run" / "state.pt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"state\.pt: damaged or from another version$"):
        train(tiny_recipe(tmp_path / "run", resume=True))


def test_a_state_from_before_an_option_existed_is_resumed_with_its_default(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    del state["recipe"]["freeze_batch_norm"]
    torch.save(state, tmp_path / "run" / "state.pt")
    train(tiny_recipe(tmp_path / "run", epochs=2, resume=True))
    assert len(log_of(tmp_path / "run")) == 2


def test_a_full_disk_is_an_os_error_and_keeps_the_saved_state(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_atomically({"epoch": torch.tensor(1)}, path)
    with files_limited_to(10_000), pytest.raises(OSError, match="File too large"):
        save_atomically({"epoch": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"epoch": torch.tensor(1)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_a_training_state_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "run" / "state.pt")
    with pytest.raises(TrainingError, match=r"state\.pt: damaged or from another version: 'recipe'"):
        train(tiny_recipe(tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "resnet18"}, "unknown model 'resnet18'; choose from supervit_"),
        ({"width": 15}, "not a multiple of"),
        ({"teacher": "no_such_teacher"}, "unknown timm model 'no_such_teacher' as the teacher"),
        ({"freeze_batch_norm": True, **LVVIT}, "freeze-batch-norm"),
        ({"keep_rates": (0.5, 0.7), **LVVIT}, "keep-rates must end in 1"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_refused_with_the_reason(
    tmp_path: Path, tiny_recipe: MakeRecipe, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(TrainingError, match=complaint):
        train(tiny_recipe(tmp_path / "run", **changes))


def test_a_nan_loss_ends_the_run_and_keeps_the_state_of_the_previous_epoch(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe(tmp_path / "run")
    with pytest.raises(TrainingError, match="became nan in step 7 of epoch 2; the state before this epoch is kept"):
        train(recipe, before_step(STEPS_PER_EPOCH + 2, lambda images: images * torch.nan))
    state = torch.load(recipe.output / "state.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in (*state["model"].values(), *state["average"].values()))
    assert len(log_of(recipe.output)) == 1


def test_the_error_of_a_failed_first_epoch_does_not_mention_a_kept_state(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    with pytest.raises(TrainingError, match="in step 1 of epoch 1; start again with a lower --learning-rate"):
        train(tiny_recipe(tmp_path / "run"), before_step(2, lambda images: images * torch.nan))
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "tensorboard"}


@pytest.mark.parametrize("kind", ["model", "average"])
def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The losses of an epoch's last step are finite, but its update makes a weight infinite."""
    update, taken = ModelEmaV3.update, 0

    def spoil(average: ModelEmaV3, model: SuperViT, step: int) -> None:
        nonlocal taken
        update(average, model, step)
        taken += 1
        if taken == 2 * STEPS_PER_EPOCH:
            (model if kind == "model" else average.module).head.bias.data[0] = torch.inf

    monkeypatch.setattr(ModelEmaV3, "update", spoil)
    recipe = tiny_recipe(tmp_path / "run")
    with pytest.raises(
        TrainingError, match="weights are not finite after epoch 2; the state before this epoch is kept"
    ):
        train(recipe)
    assert torch.load(recipe.output / "state.pt", weights_only=True)["epoch"] == 1
    load_checkpoint(recipe.output / "checkpoint.safetensors")


def test_a_broken_image_read_by_a_worker_ends_the_run_with_a_one_line_error(
    tmp_path: Path, tiny_recipe: MakeRecipe, pictures: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "red" / "3.png"
    broken.write_text("no picture")
    with pytest.raises(DataError) as caught:
        train(tiny_recipe(tmp_path / "run", data=tmp_path / "data", workers=1))
    assert str(caught.value).startswith(f"{broken}: not a readable image: ")
    assert "\n" not in str(caught.value)


def test_a_run_of_one_step_logs_no_warning(
    tmp_path: Path, tiny_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = learning_rate_schedule(tiny_recipe(tmp_path, epochs=1, learning_rate=0.5), optimizer, 1, 1)
    schedule.step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 8 / 512)
    assert not caplog.records


def test_a_device_that_cannot_be_used_is_refused(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(DeviceError, match="device 'tpu9' cannot be used"):
        train(tiny_recipe(tmp_path / "run", device="tpu9"))


def test_the_learning_rate_warms_up_linearly_and_falls_along_a_cosine(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(tmp_path, epochs=100, warmup_epochs=5, batch_size=64, learning_rate=4e-3)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = learning_rate_schedule(recipe, optimizer, steps_per_epoch=10, processes=4)
    peak = 4e-3 * 64 * 4 / 512

    def rate(step: int) -> float:
        schedule.step_update(step)
        return float(optimizer.param_groups[0]["lr"])

    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * peak)
    assert rate(0) == pytest.approx(1e-3 * peak)
    assert rate(25) == pytest.approx((1e-3 + 0.999 / 2) * peak)
    assert rate(50) == pytest.approx((0.01 + 0.99 * (1 + math.cos(math.pi / 20)) / 2) * peak)
    assert rate(500) == pytest.approx((0.01 + 0.99 / 2) * peak)
    assert rate(750) == pytest.approx((0.01 + 0.99 * (1 - math.sqrt(0.5)) / 2) * peak)
    assert rate(999) == pytest.approx(0.01 * peak, rel=1e-3)
    rates = [rate(step) for step in range(1000)]
    assert max(rates) <= peak
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_warm_up_takes_at_most_a_tenth_of_a_short_run(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = learning_rate_schedule(tiny_recipe(tmp_path, epochs=10), optimizer, 20, 1)
    schedule.step_update(20)
    assert optimizer.param_groups[0]["lr"] > 0.9 * 4e-3 * 8 / 512


def test_weight_decay_applies_only_to_matrices(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1, learning_rate=1e-30, weight_decay=0.5))
    groups = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    model = build_model(tiny_recipe(tmp_path), CLASS_NAMES)
    matrices = [name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.ndim > 1]
    sizes = {group["weight_decay"]: len(group["params"]) for group in groups}
    assert sizes == {0.5: len(matrices), 0.0: len(list(model.parameters())) - len(matrices)}


def test_a_run_can_start_from_a_plain_deit(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    torch.manual_seed(5)
    plain = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=3
    )
    torch.save(plain.state_dict(), tmp_path / "deit.pth")
    model = build_model(tiny_recipe(tmp_path, init=tmp_path / "deit.pth"), CLASS_NAMES)
    assert torch.equal(model.pos_embed_list[2], plain.pos_embed)
    path = train(tiny_recipe(tmp_path / "run", init=tmp_path / "deit.pth", learning_rate=1e-9, epochs=1))
    torch.testing.assert_close(read_weights(path)["blocks.1.mlp.fc1.weight"], plain.blocks[1].mlp.fc1.weight)


def test_a_run_can_start_from_a_supervit_checkpoint(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT]
) -> None:
    model = build(tiny_config)
    header = Header("first", tiny_config, CLASS_NAMES, ProfileTable.unmeasured(tiny_config))
    save_checkpoint(tmp_path / "first.safetensors", model, header)
    recipe = tiny_recipe(tmp_path / "run", init=tmp_path / "first.safetensors", learning_rate=1e-9, epochs=1)
    weights = load_checkpoint(train(recipe)).model.state_dict()
    assert all(torch.allclose(weights[name], tensor, atol=1e-5) for name, tensor in model.state_dict().items())


@pytest.fixture
def foreign_file(tmp_path: Path, tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT]) -> Path:
    """A SuperViT of other classes and with preprocessing of its own."""
    config = replace(tiny_config, mean=(0.5, 0.5, 0.5), num_classes=2)
    path = tmp_path / "foreign.safetensors"
    save_checkpoint(path, build(config), Header("foreign", config, ("cat", "dog"), ProfileTable.unmeasured(config)))
    return path


def test_freeze_batch_norm_is_refused_for_a_deit(foreign_file: Path, tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(TrainingError, match="freeze-batch-norm"):
        train(tiny_recipe(tmp_path / "run", freeze_batch_norm=True, init=foreign_file))


def test_architecture_and_preprocessing_come_from_the_initial_weights(
    foreign_file: Path, tmp_path: Path, pictures: Path
) -> None:
    recipe = Recipe(data=pictures, output=tmp_path, init=foreign_file, keep_rates=(0.5, 1.0))
    config = build_model(recipe, CLASS_NAMES).config
    assert (config.width, config.patch_grids, config.keep_rates) == (16, (2, 3, 4), (0.5, 1.0))
    assert (config.mean, config.num_classes) == ((0.5, 0.5, 0.5), 3)


def test_the_normalisation_comes_from_the_initial_weights_unless_it_is_given(
    foreign_file: Path, tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    assert build_model(tiny_recipe(tmp_path, init=foreign_file), CLASS_NAMES).config.mean == (0.5, 0.5, 0.5)
    named = tiny_recipe(tmp_path, init=foreign_file, mean=(0.1, 0.2, 0.3))
    assert build_model(named, CLASS_NAMES).config.mean == (0.1, 0.2, 0.3)


def test_the_head_is_fitted_before_training_if_the_classes_are_new_to_the_initial_weights(
    foreign_file: Path, tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    """Features of random weights separate the three tints; a fresh head does not, and a tiny rate trains nothing."""
    options = {"init": foreign_file, "epochs": 1, "learning_rate": 1e-9}
    train(tiny_recipe(tmp_path / "fitted", **options))
    train(tiny_recipe(tmp_path / "fresh", fit_head=False, **options))
    fitted, fresh = (
        json.loads((tmp_path / run / "log.jsonl").read_text())["top1"]["grid 4 at keep rate 1"]
        for run in ("fitted", "fresh")
    )
    assert fitted == 1
    assert fresh < 0.7


def test_layer_decay_lowers_the_learning_rate_of_earlier_layers(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(tmp_path, layer_decay=0.5)
    model = build_model(recipe, CLASS_NAMES)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(recipe, model)
    learning_rate_schedule(recipe, optimizer, 10, 1).step_update(20)
    rates = {names[id(parameter)]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    head = rates["head.weight"]
    assert head > 0
    blocks = [rates[f"blocks.{index}.mlp.fc1.weight"] for index in range(3)]
    assert blocks == pytest.approx([head / 8, head / 4, head / 2])
    assert rates["norm.weight"] == pytest.approx(head / 2)
    for stem in ("patch_embed.proj.weight", "pos_embed_list.0", "cls_token"):
        assert rates[stem] == pytest.approx(head / 16)


@pytest.mark.usefixtures("in_float32")
def test_the_largest_subnetwork_of_the_initial_weights_can_teach_all_others(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT]
) -> None:
    model = build(tiny_config)
    header = Header("first", tiny_config, CLASS_NAMES, ProfileTable.unmeasured(tiny_config))
    save_checkpoint(tmp_path / "first.safetensors", model, header)
    recipe = tiny_recipe(tmp_path / "run", init=tmp_path / "first.safetensors", teacher_self=True)
    teacher = build_teacher(recipe, model)
    assert teacher is not None
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        expected = model(images, tiny_config.largest).softmax(dim=1)
    with torch.no_grad():
        model.head.weight.zero_()  # what the student learns does not change its teacher
    torch.testing.assert_close(teacher(images), expected)
    losses = {}
    changes: dict[str, dict[str, object]] = {"alone": {"teacher_self": False}, "taught": {"teacher_weight": 1.0}}
    for name, options in changes.items():
        train(recipe.model_copy(update={"output": tmp_path / name, "epochs": 1, "learning_rate": 1e-9, **options}))
        losses[name] = json.loads((tmp_path / name / "log.jsonl").read_text())["loss"]["largest grid"]
    assert losses["taught"] < 0.01 < losses["alone"]


def test_a_teacher_from_a_file_is_distilled(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    torch.manual_seed(1)
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    losses = []
    for weight in (0.0, 1.0):
        output = tmp_path / str(weight)
        train(tiny_recipe(output, epochs=1, teacher="test_vit", teacher_checkpoint=path, teacher_weight=weight))
        loss = log_of(output)[0]["loss"]
        assert isinstance(loss, dict)
        losses.append(loss["largest grid"])
    assert losses[1] < losses[0]  # the soft answers of an untrained teacher are near the student's own


def test_unusable_options_are_refused_before_the_run_folder_is_created(
    tmp_path: Path, tiny_recipe: MakeRecipe, pictures: Path
) -> None:
    with pytest.raises(TrainingError, match="48 training images per process do not fill a batch of 64"):
        train(tiny_recipe(tmp_path / "run", batch_size=64))
    with pytest.raises(DataError, match="absent/train: not a folder"):
        train(tiny_recipe(tmp_path / "run", data=tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="absent: no such file"):
        train(tiny_recipe(tmp_path / "run", init=tmp_path / "absent"))
    with pytest.raises(TrainingError, match="width 15 is not a multiple of 2 heads"):
        train(tiny_recipe(tmp_path / "run", width=15))
    with pytest.raises(TrainingError, match="unknown model 'test_vit'; choose from supervit_deit_micro_patch4_32, "):
        train(Recipe(data=pictures, output=tmp_path / "run", model="test_vit", workers=0))
    assert not (tmp_path / "run").exists()


def test_the_seed_determines_every_generator() -> None:
    draws = []
    for parts in ((1, 2), (1, 2), (12,), (1, 3)):
        seed_everything(*parts)
        draws.append((random.random(), float(np.random.rand()), torch.rand(1).item()))  # noqa: NPY002 - timm draws from it
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert all(len({draw[place] for draw in draws}) == 3 for place in range(3))


@pytest.mark.parametrize("options", [{}, LVVIT], ids=["deit", "lvvit"])
def test_two_processes_take_the_steps_of_one_process_on_the_whole_batch(
    tmp_path: Path, tiny_recipe: MakeRecipe, options: dict[str, object]
) -> None:
    """Gradients of all four sub-networks are averaged, including those of a grid that only the first pair uses."""
    recipe = tiny_recipe(tmp_path / "run", epochs=1, seed=2, **options)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True))
    script = Path(__file__).with_name("two_processes.py")
    root = script.parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, script, tmp_path / "recipe.json", tmp_path / "weights.pt"],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,  # a busy machine starts processes slowly
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert together.pop("exchanges") == 3  # one per step, although every process takes two batches of two pairs
    alone = weights_after_three_steps(recipe, ALONE, batches=1)
    seed_everything(recipe.seed)
    for name, start in build_model(recipe, CLASS_NAMES).named_parameters():
        assert torch.allclose(together[name], alone[name], atol=1e-5, rtol=1e-5), name
        assert not torch.allclose(alone[name], start, atol=1e-4, rtol=1e-4), name
    checkpoint, watched = load_checkpoint(recipe.output / "checkpoint.safetensors"), recipe.data / "val"
    loader = SampleLoader(open_folder(watched, evaluation_transform(checkpoint.config)), recipe.batch_size)
    ends = SubNetwork(2, 0.5), SubNetwork(4, 1.0)
    measured = measure_accuracy(make_answer(checkpoint.model), loader, dict.fromkeys(ends, Scaling()))
    top1 = [record["top1"] for record in log_of(recipe.output)]
    assert top1 == [{str(end): measured[end].top1 for end in ends}]
