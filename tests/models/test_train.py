import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3

from models.checkpoint import CheckpointError, Header, load_checkpoint, read_weights, save_checkpoint
from models.data import DataError
from models.devices import DeviceError
from models.objective import PairChoice, sample_pairs, training_step
from models.profiles import ProfileTable
from models.recipe import Recipe
from models.state import TrainingError, save_whole
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT
from models.train import (
    Process,
    build_model,
    join_processes,
    learning_rate_schedule,
    run_epochs,
    seed_everything,
    train,
)
from tests.models.two_processes import weights_after_three_steps

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


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let `act` change the images of one step, counted from 1, or raise instead."""
    taken = 0

    def step(
        pair_loss: torch.nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, *rest: object
    ) -> dict[str, float]:
        nonlocal taken
        taken += 1
        return training_step(pair_loss, optimizer, act(images) if taken == number else images, *rest)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr("models.train.training_step", step)


def interrupt(images: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt(len(images))


def log_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_checkpoint_its_state_its_log_and_its_picture(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    output = tmp_path / "deep" / "run"
    path = train(tiny_recipe(output))
    assert path == output / "checkpoint.safetensors"
    assert {file.name for file in output.iterdir()} == {
        "checkpoint.safetensors",
        "state.pt",
        "log.jsonl",
        "training.png",
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


def test_training_learns_to_tell_the_tints(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
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
        (EVERYTHING_RANDOM | LVVIT | {"drop_path": 0.0}, STEPS_PER_EPOCH + 6),
        ({"single_epochs": 2}, STEPS_PER_EPOCH + 3),
        ({"single_epochs": 1}, 2 * STEPS_PER_EPOCH + 3),
    ],
    ids=["plain", "one worker", "all random", "all random, one worker", "lvvit", "cheap epochs", "after cheap epochs"],
)
def test_an_interrupted_run_that_is_resumed_ends_bit_for_bit_as_an_unbroken_one(
    tmp_path: Path, tiny_recipe: MakeRecipe, options: dict[str, object], interrupted_at: int
) -> None:
    unbroken = train(tiny_recipe(tmp_path / "unbroken" / "run", **options))
    recipe = tiny_recipe(tmp_path / "broken" / "run", **options)
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, interrupted_at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert len(log_of(recipe.output)) == (interrupted_at - 1) // STEPS_PER_EPOCH
    torch.manual_seed(12345)  # another process would have other generators
    resumed = train(recipe.model_copy(update={"resume": True}))
    assert resumed.read_bytes() == unbroken.read_bytes()
    untimed = [
        [{name: value for name, value in record.items() if name != "seconds"} for record in log_of(path.parent)]
        for path in (resumed, unbroken)
    ]
    assert untimed[0] == untimed[1]


def test_every_epoch_shows_every_image_in_an_order_of_its_own(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def step(pair_loss: object, optimizer: object, images: torch.Tensor, labels: torch.Tensor, *_: object) -> object:
        del pair_loss, optimizer, images
        seen.extend(labels.tolist())
        return {"largest grid": 0.0}

    monkeypatch.setattr("models.train.training_step", step)
    train(tiny_recipe(tmp_path / "run", epochs=2))
    first, second = seen[:48], seen[48:]
    assert first != second
    assert [first.count(label) for label in range(3)] == [second.count(label) for label in range(3)] == [16, 16, 16]


def test_steps_are_counted_on_from_epoch_to_epoch(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def choose(config: SuperViTConfig, seed: int, step: int) -> tuple[PairChoice, ...]:
        asked.append(step)
        return sample_pairs(config, seed, step)

    monkeypatch.setattr("models.train.sample_pairs", choose)
    recipe = tiny_recipe(tmp_path / "run")
    train(recipe)
    assert asked == list(range(3 * STEPS_PER_EPOCH))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = learning_rate_schedule(recipe, optimizer, STEPS_PER_EPOCH, 1)
    for record in log_of(recipe.output):
        schedule.step_update(int(str(record["epoch"])) * STEPS_PER_EPOCH - 1)
        assert record["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_a_resumed_run_follows_the_rate_that_it_is_given_now(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1, learning_rate=0.04))
    recipe = tiny_recipe(tmp_path / "run", epochs=2, learning_rate=0.001, resume=True)
    train(recipe)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    learning_rate_schedule(recipe, optimizer, STEPS_PER_EPOCH, 1).step_update(2 * STEPS_PER_EPOCH - 1)
    assert log_of(recipe.output)[-1]["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_every_process_takes_its_own_share(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise InterruptedError(arguments[3:5])

    monkeypatch.setattr("models.train.open_batches", stop)
    with pytest.raises(InterruptedError, match=r"\(1, 2\)"):
        run_epochs(tiny_recipe(tmp_path / "run"), Process(1, 2, torch.device("cpu")))


def test_the_first_epochs_can_be_cheap_ones_of_a_single_subnetwork(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=3, single_epochs=2))
    single = ["single grid"]
    four = ["largest grid", "largest grid, pruned", "smaller grid", "smaller grid, pruned"]
    assert [list(record["loss"]) for record in log_of(tmp_path / "run")] == [single, single, four]  # type: ignore[call-overload] # read from JSON


def test_the_stem_can_be_trained_with_the_statistics_that_it_is_served_with(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    first = train(tiny_recipe(tmp_path / "first", **LVVIT))
    followed = train(tiny_recipe(tmp_path / "followed", init=first, **LVVIT))
    frozen = train(tiny_recipe(tmp_path / "frozen", init=first, freeze_batch_norm=True, **LVVIT))
    before, moved, kept = (read_weights(path) for path in (first, followed, frozen))
    for name in ("patch_embed.bn1.running_mean", "patch_embed.bn3.running_var"):
        assert not torch.equal(moved[name], before[name])
        assert torch.equal(kept[name], before[name])
    name = "patch_embed.bn1.weight"  # scale and shift are learned all the same
    assert not torch.equal(kept[name], before[name])


def test_a_family_of_one_that_fuses_is_trained_saved_and_loaded(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    path = train(tiny_recipe(tmp_path / "run", epochs=1, patch_grids=(4,), keep_rates=(0.5,), fuse_pruned=True))
    assert list(log_of(tmp_path / "run")[0]["loss"]) == ["single grid"]  # type: ignore[call-overload] # read from JSON
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.fuse_pruned
    assert [str(row.subnetwork) for row in checkpoint.profile.rows] == ["grid 4 at keep rate 0.5"]


def test_a_teacher_that_was_asked_once_is_learned_from(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(11)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "teacher.pth")
    taught: list[torch.Tensor] = []

    def step(pair_loss: object, optimizer: object, images: object, targets: torch.Tensor, *rest: object) -> object:
        del pair_loss, optimizer, images
        taught.append(targets)
        assert rest[0] is None  # it is not asked again
        return {"largest grid": 0.0}

    monkeypatch.setattr("models.train.training_step", step)
    options = {"teacher": "test_vit", "teacher_checkpoint": tmp_path / "teacher.pth", "teacher_side": 32}
    train(tiny_recipe(tmp_path / "run", epochs=1, teacher_once=True, **options))
    assert {targets.shape for targets in taught} == {(8, 3)}
    monkeypatch.delattr("models.teacher.Teacher.answer_both_ways")  # a run that is resumed asks no more
    train(tiny_recipe(tmp_path / "run", epochs=2, teacher_once=True, resume=True, **options))
    assert len(taught) == 2 * STEPS_PER_EPOCH


def test_the_average_forgets_the_first_weights_however_slow_it_is(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(tmp_path / "run", epochs=1, learning_rate=0.5, ema_decay=0.99996)
    seed_everything(recipe.seed)
    first = build_model(recipe, 3).state_dict()["head.weight"]
    train(recipe)
    state = torch.load(recipe.output / "state.pt", weights_only=True)
    last, average = state["model"]["head.weight"], state["average"]["head.weight"]
    assert (average - last).norm() < (average - first).norm()


def test_an_epoch_that_is_taken_again_stands_in_the_log_once(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"epoch": 2, "loss": "of a state that was lost"}\n')
    train(tiny_recipe(tmp_path / "run", epochs=2, resume=True))
    records = log_of(tmp_path / "run")
    assert [record["epoch"] for record in records] == [1, 2]
    assert isinstance(records[1]["loss"], dict)


def test_another_seed_ends_elsewhere(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    paths = [train(tiny_recipe(tmp_path / str(seed) / "run", epochs=1, seed=seed)) for seed in (0, 1)]
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_a_finished_run_that_is_resumed_is_left_as_it_is(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    path = train(tiny_recipe(tmp_path / "run", epochs=1))
    before = path.read_bytes()
    assert train(tiny_recipe(tmp_path / "run", epochs=1, resume=True)) == path
    assert path.read_bytes() == before


def test_a_run_is_never_overwritten_without_being_resumed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "state.pt").read_bytes()
    with pytest.raises(TrainingError, match="run: holds a run already; go on with --resume"):
        train(tiny_recipe(tmp_path / "run"))
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_there_must_be_a_run_to_resume(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(TrainingError, match=r"state\.pt: nothing to resume"):
        train(tiny_recipe(tmp_path / "run", resume=True))


def test_a_run_of_another_model_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    with pytest.raises(TrainingError, match=r"state\.pt: was made with --width 16, not 32$"):
        train(tiny_recipe(tmp_path / "run", resume=True, width=32))


def test_a_run_over_renamed_classes_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe, pictures: Path) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for old, new in (("blue", "blue"), ("green", "lime"), ("red", "red")):
            (tmp_path / "data" / split / new).symlink_to(pictures / split / old, target_is_directory=True)
    with pytest.raises(TrainingError, match=r"was made with class folder green, not lime$"):
        train(tiny_recipe(tmp_path / "run", resume=True, data=tmp_path / "data"))


def test_a_damaged_log_is_found_before_an_epoch_is_spent(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    (tmp_path / "run" / "log.jsonl").write_text("{")
    before_step(monkeypatch, 1, interrupt)
    with pytest.raises(TrainingError, match=r"log\.jsonl: damaged"):
        train(tiny_recipe(tmp_path / "run", resume=True))


def test_a_new_run_writes_over_the_log_of_one_that_saved_nothing(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{")
    train(tiny_recipe(tmp_path / "run", epochs=1))
    assert [record["epoch"] for record in log_of(tmp_path / "run")] == [1]


@pytest.mark.parametrize("name", ["file/run", "x" * 300], ids=["below a file", "too long"])
def test_an_unusable_output_folder_is_found_before_the_first_step(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").write_text("")
    before_step(monkeypatch, 1, interrupt)
    with pytest.raises(TrainingError, match=f"{name}: cannot be written to: "):
        train(tiny_recipe(tmp_path / name))


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_a_damaged_state_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe, content: bytes) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    (tmp_path / "run" / "state.pt").write_bytes(content)
    with pytest.raises(TrainingError, match=r"state\.pt: damaged or of another version$"):
        train(tiny_recipe(tmp_path / "run", resume=True))


def test_a_run_from_before_an_option_existed_is_one_that_left_it_out(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    del state["recipe"]["freeze_batch_norm"]
    torch.save(state, tmp_path / "run" / "state.pt")
    train(tiny_recipe(tmp_path / "run", epochs=2, resume=True))
    assert len(log_of(tmp_path / "run")) == 2


def test_a_full_disk_is_an_os_error_and_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_whole({"epoch": torch.tensor(1)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_whole({"epoch": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path, weights_only=True) == {"epoch": torch.tensor(1)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_of_something_else_cannot_be_resumed(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "run" / "state.pt")
    with pytest.raises(TrainingError, match=r"state\.pt: damaged or of another version: 'recipe'"):
        train(tiny_recipe(tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "resnet18"}, "no model 'resnet18'; there are supervit_"),
        ({"width": 15}, "not a multiple of"),
        ({"teacher": "no_such_teacher"}, "timm knows no model 'no_such_teacher'"),
        ({"freeze_batch_norm": True, **LVVIT}, "freeze-batch-norm"),
        ({"freeze_batch_norm": True, "init": Path("a_deit.safetensors")}, "freeze-batch-norm"),
    ],
)
def test_a_recipe_that_cannot_be_built_says_why(
    tmp_path: Path, tiny_recipe: MakeRecipe, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(TrainingError, match=complaint):
        train(tiny_recipe(tmp_path / "run", **changes))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_epoch_before(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, STEPS_PER_EPOCH + 2, lambda images: images * torch.nan)
        with pytest.raises(TrainingError, match="became nan in step 7 of epoch 2; the state before this epoch is kept"):
            train(recipe)
    state = torch.load(recipe.output / "state.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in (*state["model"].values(), *state["average"].values()))
    assert len(log_of(recipe.output)) == 1


def test_nothing_is_said_to_be_kept_when_the_first_epoch_fails(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 2, lambda images: images * torch.nan)
        with pytest.raises(TrainingError, match="in step 1 of epoch 1; start again with a lower --learning-rate"):
            train(tiny_recipe(tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("kind", ["model", "average"])
def test_weights_that_are_no_numbers_are_never_saved(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The losses of an epoch's last step were finite; what its update made of the weights is not."""
    update, taken = ModelEmaV3.update, 0

    def spoil(average: ModelEmaV3, model: SuperViT, step: int) -> None:
        nonlocal taken
        update(average, model, step)
        taken += 1
        if taken == 2 * STEPS_PER_EPOCH:
            (model if kind == "model" else average.module).head.bias.data[0] = torch.inf

    monkeypatch.setattr(ModelEmaV3, "update", spoil)
    recipe = tiny_recipe(tmp_path / "run")
    with pytest.raises(TrainingError, match="no longer numbers after epoch 2; the state before this epoch is kept"):
        train(recipe)
    assert torch.load(recipe.output / "state.pt", weights_only=True)["epoch"] == 1
    load_checkpoint(recipe.output / "checkpoint.safetensors")


def test_a_broken_image_ends_a_run_in_one_line_with_workers_too(
    tmp_path: Path, tiny_recipe: MakeRecipe, pictures: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    broken = tmp_path / "data" / "train" / "red" / "3.png"
    broken.write_text("no picture")
    with pytest.raises(DataError) as caught:
        train(tiny_recipe(tmp_path / "run", data=tmp_path / "data", workers=1))
    assert str(caught.value).startswith(f"{broken}: not a readable image: ")
    assert "\n" not in str(caught.value)


def test_a_run_of_one_step_is_no_reason_to_warn(
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


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_every_process_takes_the_gpu_of_its_own_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    taken: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))  # noqa: ARG005 - there is no such GPU
    assert join_processes(name) == Process(0, 1, torch.device("cuda:1"))
    assert taken == [torch.device("cuda:1")]


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


def test_weight_decay_is_for_matrices(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path / "run", epochs=1, learning_rate=1e-30, weight_decay=0.5))
    groups = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    model = build_model(tiny_recipe(tmp_path), 3)
    matrices = [name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.ndim > 1]
    sizes = {group["weight_decay"]: len(group["params"]) for group in groups}
    assert sizes == {0.5: len(matrices), 0.0: len(list(model.parameters())) - len(matrices)}


def test_a_run_can_start_from_a_plain_deit(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    torch.manual_seed(5)
    plain = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=3
    )
    torch.save(plain.state_dict(), tmp_path / "deit.pth")
    model = build_model(tiny_recipe(tmp_path, init=tmp_path / "deit.pth"), 3)
    assert torch.equal(model.pos_embed_list[2], plain.pos_embed)
    path = train(tiny_recipe(tmp_path / "run", init=tmp_path / "deit.pth", learning_rate=1e-9, epochs=1))
    torch.testing.assert_close(read_weights(path)["blocks.1.mlp.fc1.weight"], plain.blocks[1].mlp.fc1.weight)


def test_a_run_can_start_from_a_checkpoint_of_ours(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT]
) -> None:
    model = build(tiny_config)
    header = Header("first", tiny_config, ("a", "b", "c"), ProfileTable.unmeasured(tiny_config))
    save_checkpoint(tmp_path / "first.safetensors", model, header)
    recipe = tiny_recipe(tmp_path / "run", init=tmp_path / "first.safetensors", learning_rate=1e-9, epochs=1)
    weights = load_checkpoint(train(recipe)).model.state_dict()
    assert all(torch.allclose(weights[name], tensor, atol=1e-5) for name, tensor in model.state_dict().items())


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


def test_what_cannot_be_trained_is_refused_before_it_starts(
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
    with pytest.raises(TrainingError, match="no model 'test_vit'; there are supervit_deit_micro_patch4_32, "):
        train(Recipe(data=pictures, output=tmp_path / "run", model="test_vit", workers=0))
    assert not (tmp_path / "run").exists()


def test_the_seed_fixes_every_generator() -> None:
    draws = []
    for parts in ((1, 2), (1, 2), (12,), (1, 3)):
        seed_everything(*parts)
        draws.append((random.random(), float(np.random.rand()), torch.rand(1).item()))  # noqa: NPY002 - timm draws from it
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert all(len({draw[place] for draw in draws}) == 3 for place in range(3))


@pytest.mark.parametrize("options", [{}, LVVIT], ids=["deit", "lvvit"])
def test_two_processes_step_as_one_on_the_whole_batch(
    tmp_path: Path, tiny_recipe: MakeRecipe, options: dict[str, object]
) -> None:
    """Gradients of all four sub-networks are averaged, those of a grid that only the first pair uses as well."""
    recipe = tiny_recipe(tmp_path / "run", epochs=1, seed=2, **options)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True))
    script = Path(__file__).with_name("two_processes.py")
    root = script.parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, script, tmp_path / "recipe.json", tmp_path / "weights.pt"],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    alone = weights_after_three_steps(recipe, Process(0, 1, torch.device("cpu")))
    seed_everything(recipe.seed)
    for name, start in build_model(recipe, 3).named_parameters():
        assert torch.allclose(together[name], alone[name], atol=1e-5, rtol=1e-5), name
        assert not torch.allclose(alone[name], start, atol=1e-4, rtol=1e-4), name
    assert len(log_of(recipe.output)) == 1
    load_checkpoint(recipe.output / "checkpoint.safetensors")
