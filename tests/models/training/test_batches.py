import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.nn import functional

from models.data.datasets import open_folder, open_training_data
from models.data.images import evaluation_transform, normalise
from models.data.loaders import SampleLoader
from models.errors import DataError
from models.processes import ALONE, Process
from models.subnetwork import SuperViTConfig
from models.training.batches import TARGETS_NAME, ImageBatches, crop_and_mirror, fits_memory, open_batches, soft_targets
from models.training.recipe import Recipe
from models.training.state import TrainingError
from models.training.teacher import Teacher

MakeRecipe = Callable[..., Recipe]
ASKED_ONCE: dict[str, Any] = {"teacher": "test_vit", "teacher_once": True}


def numbered(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8 images in which no two pixels are alike and none is black."""
    pixels = torch.randperm(250, generator=torch.Generator().manual_seed(0))[: side * side] + 1
    return pixels.view(1, 1, side, side).expand(count, 3, side, side).to(torch.uint8)


def test_crops_are_shifts_of_the_image_or_its_mirror_image_padded_with_black() -> None:
    torch.manual_seed(0)
    images = numbered(2000, 8)
    cropped = crop_and_mirror(images)
    assert cropped.dtype == torch.uint8
    possible = {
        (mirrored, top, left): functional.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]
        for mirrored, image in ((False, images[0]), (True, images[0].flip(2)))
        for top in range(3)
        for left in range(3)
    }
    counts = {key: int((cropped == image).flatten(1).all(dim=1).sum()) for key, image in possible.items()}
    assert sum(counts.values()) == 2000
    assert all(70 < count < 160 for count in counts.values())  # 111 of each on average


def test_each_augmented_image_of_a_batch_keeps_its_target(tiny_config: SuperViTConfig) -> None:
    images = torch.arange(1, 11, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 16, 16)
    targets = torch.arange(1, 11)
    sampler = RepeatAugSampler(targets, 1, 0, num_repeats=1, selected_round=0)
    batches = ImageBatches(images, targets, sampler, 4, tiny_config, random_erasing=0.0)
    assert len(batches) == 2
    seen = []
    for varied, labels in batches:
        assert varied.shape == (4, 3, 16, 16)
        levels = normalise(labels.view(4, 1, 1, 1).expand(4, 3, 1, 1).to(torch.uint8), tiny_config)
        torch.testing.assert_close(varied[:, :, 8:9, 8:9], levels)  # a shift of 2 leaves the middle
        seen += labels.tolist()
    assert len(set(seen)) == 8


def test_random_erasing_applies_to_images_in_memory(tiny_config: SuperViTConfig) -> None:
    torch.manual_seed(0)
    images = torch.full((8, 3, 16, 16), 128, dtype=torch.uint8)
    sampler = RepeatAugSampler(range(8), 1, 0, num_repeats=1, selected_round=0)
    plain, erased = (
        next(iter(ImageBatches(images, torch.zeros(8), sampler, 8, tiny_config, chance)))[0] for chance in (0.0, 1.0)
    )
    values = [len(image[0, 4:12, 4:12].unique()) for image in plain]
    assert values == [1] * 8
    assert max(len(image[0].unique()) for image in erased) > 3


@pytest.mark.parametrize(
    ("options", "is_kept"),
    [({}, True), ({"rand_augment": "rand-m9"}, False), ({"patch_kernel": 17}, False), ({"patch_kernel": 16}, True)],
)
def test_small_images_are_kept_in_memory_unless_each_is_augmented_by_itself(
    tmp_path: Path, tiny_recipe: MakeRecipe, options: dict[str, object], is_kept: bool
) -> None:
    recipe = tiny_recipe(tmp_path, **options)
    config = SuperViTConfig(patch_grids=(2, 4), patch_kernel=recipe.patch_kernel or 0)
    assert fits_memory(recipe, config) == is_kept
    batches, _, _ = open_batches(recipe, config, None, ALONE)
    assert isinstance(batches, ImageBatches if is_kept else SampleLoader)
    images, labels = next(iter(batches))
    assert images.shape == (8, 3, config.image_side, config.image_side)
    assert images.dtype == torch.float32
    assert labels.shape == (8,)


def test_images_beyond_the_memory_limit_are_not_kept_in_memory(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig
) -> None:
    size_bytes = 48 * 3 * 16 * 16
    assert fits_memory(tiny_recipe(tmp_path), tiny_config, size_bytes)
    assert not fits_memory(tiny_recipe(tmp_path), tiny_config, size_bytes - 1)


def test_images_in_memory_are_uncropped_and_keep_their_labels(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig
) -> None:
    config = replace(tiny_config, crop_fraction=1.0)
    recipe = tiny_recipe(tmp_path)
    batches, _, watched = open_batches(recipe, config, None, ALONE)
    assert isinstance(batches, ImageBatches)
    expected = open_folder(recipe.data / "train", evaluation_transform(config))
    assert len(batches.images) == len(expected)
    for index in range(len(expected)):
        image, label = expected[index]
        assert torch.equal(batches.images[index], image)
        assert batches.targets[index] == label
    assert [len(labels) for _, labels in watched] == [8, 4]


def vary(in_memory: bool) -> dict[str, object]:
    """Return options that keep the images in memory, or that augment each image by itself as it is read."""
    return {"rand_augment": "" if in_memory else "rand-m9"}


def ask(recipe: Recipe, config: SuperViTConfig, teacher: Teacher) -> Tensor:
    images, _ = open_training_data(
        recipe.data, config, evaluation_transform(config), recipe.holdout, recipe.seed, recipe.max_bad_images
    )
    return soft_targets(recipe, config, teacher, images)


@pytest.fixture
def teacher(tmp_path: Path, tiny_config: SuperViTConfig) -> Teacher:
    torch.manual_seed(11)
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    return Teacher.load("test_vit", path, 32, tiny_config)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_teacher_that_is_asked_once_turns_labels_into_soft_targets(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    tiny_config: SuperViTConfig,
    teacher: Teacher,
    in_memory: bool,
) -> None:
    config = replace(tiny_config, crop_fraction=1.0)
    options = {"teacher": "test_vit", "teacher_once": True, "teacher_weight": 0.25, "label_smoothing": 0.3}
    varied = vary(in_memory)
    recipe = tiny_recipe(tmp_path, **options, **varied)
    plain, _, _ = open_batches(tiny_recipe(tmp_path, **varied), config, None, ALONE)
    batches, _, _ = open_batches(recipe, config, teacher, ALONE)
    for (_, targets), (_, labels) in zip(batches, plain, strict=True):
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        assert answers_in(targets, labels).min() > -1e-5
    assert isinstance(batches, ImageBatches) == in_memory
    assert len(batches) == 6
    if isinstance(batches, ImageBatches) and isinstance(plain, ImageBatches):  # before they are cropped and mirrored
        images = normalise(batches.images, config)
        expected = (teacher(images) + teacher(images.flip(3))) / 2
        torch.testing.assert_close(answers_in(batches.targets, plain.targets), expected, atol=1e-4, rtol=1e-3)


def answers_in(targets: Tensor, labels: Tensor) -> Tensor:
    """Return the teacher's probabilities, given targets of which they make up a quarter."""
    smooth = functional.one_hot(labels, 3) * 0.7 + 0.1
    return (targets - 0.75 * smooth) / 0.25


class Silent(Teacher):
    """A teacher that must not be asked."""

    def classify_with_mirror(self, images: Tensor) -> Tensor:
        raise AssertionError(f"asked about {len(images)} images")


def test_saved_answers_of_a_teacher_are_used_without_asking_it_again(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    tiny_config: SuperViTConfig,
    teacher: Teacher,
) -> None:
    recipe = tiny_recipe(tmp_path, **ASKED_ONCE)
    first, _, _ = open_batches(recipe, tiny_config, teacher, ALONE)
    second, _, _ = open_batches(recipe, tiny_config, Silent(teacher.network, tiny_config), ALONE)
    assert isinstance(first, ImageBatches)
    assert isinstance(second, ImageBatches)
    assert torch.equal(first.targets, second.targets)


def test_a_teacher_of_other_initial_weights_is_asked_again(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig, teacher: Teacher
) -> None:
    init = tmp_path / "init.safetensors"
    init.write_bytes(b"weights")
    options = {"init": init, "teacher_self": True, "teacher_once": True, "teacher_weight": 0.5, "fit_head": False}
    recipe = tiny_recipe(tmp_path, **options)
    ask(recipe, tiny_config, teacher)
    silent = Silent(teacher.network, tiny_config)
    ask(recipe, tiny_config, silent)
    for other, config in (
        (recipe.model_copy(update={"fit_head": True}), tiny_config),
        (recipe, replace(tiny_config, interpolation="bilinear")),
        (recipe, replace(tiny_config, prune_blocks=(2,))),
    ):
        with pytest.raises(AssertionError, match="asked about"):
            ask(other, config, silent)
    init.write_bytes(b"other weights")
    with pytest.raises(AssertionError, match="asked about"):
        ask(recipe, tiny_config, silent)


def test_damaged_saved_answers_of_a_teacher_are_computed_again(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig, teacher: Teacher
) -> None:
    recipe = tiny_recipe(tmp_path, **ASKED_ONCE)
    answers = ask(recipe, tiny_config, teacher)
    kept = tmp_path / TARGETS_NAME
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"nonsense"):
        kept.write_bytes(damaged)
        assert torch.equal(ask(recipe, tiny_config, teacher), answers)
        assert torch.equal(torch.load(kept, weights_only=True)["targets"], answers)


def test_a_teacher_is_asked_again_if_its_weights_or_the_preprocessing_change(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig, teacher: Teacher
) -> None:
    path = tmp_path / "teacher.pth"
    recipe = tiny_recipe(tmp_path, **ASKED_ONCE, teacher_checkpoint=path)
    answers = [ask(recipe, tiny_config, teacher)]
    answers.append(ask(recipe, replace(tiny_config, crop_fraction=0.5), teacher))
    weights = torch.load(path, weights_only=True)
    torch.save(weights | {"head.bias": torch.tensor([9.0, 0.0, 0.0])}, path)  # under the same name
    answers.append(ask(recipe, tiny_config, Teacher.load("test_vit", path, 32, tiny_config)))
    for first, second in itertools.combinations(answers, 2):
        assert not torch.equal(first, second)


def test_a_teacher_is_asked_again_if_the_label_of_an_image_changes(
    tmp_path: Path, pictures: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig, teacher: Teacher
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    recipe = tiny_recipe(tmp_path, data=data, **ASKED_ONCE)
    before = ask(recipe, tiny_config, teacher)
    first, *_, last = sorted((data / "train").iterdir())
    image = min(first.iterdir())
    image.rename(last / f"moved{image.suffix}")  # as many images of the same classes as before
    assert not torch.equal(ask(recipe, tiny_config, teacher), before)


def test_processes_divide_the_images_among_themselves(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig
) -> None:
    shares = []
    for rank in range(2):
        _, sampler, _ = open_batches(tiny_recipe(tmp_path), tiny_config, None, Process(rank, 2, ALONE.device))
        sampler.set_epoch(1)
        shares.append(list(sampler))
    assert sorted(shares[0] + shares[1]) == list(range(48))


def test_too_few_images_for_a_batch_are_refused(
    tmp_path: Path, tiny_recipe: MakeRecipe, tiny_config: SuperViTConfig
) -> None:
    with pytest.raises(TrainingError, match="48 training images per process do not fill a batch of 64"):
        open_batches(tiny_recipe(tmp_path, batch_size=64), tiny_config, None, ALONE)
    with pytest.raises(TrainingError, match="24 training images per process do not fill a batch of 32"):
        open_batches(tiny_recipe(tmp_path, batch_size=32), tiny_config, None, Process(1, 2, ALONE.device))


@pytest.fixture
def damaged(pictures: Path, tmp_path: Path) -> Path:
    """A data set of 48 images to train on, of which numbers 17 and 47 cannot be read."""
    shutil.copytree(pictures, tmp_path / "damaged")
    for name in ("green/0.png", "red/9.png"):  # in the order of their names, 10 comes before 2
        (tmp_path / "damaged" / "train" / name).write_text("no picture")
    return tmp_path / "damaged"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_and_batches_stay_full(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    tiny_config: SuperViTConfig,
    damaged: Path,
    capsys: pytest.CaptureFixture[str],
    in_memory: bool,
    workers: int,
) -> None:
    options = vary(in_memory) | {"max_bad_images": 0.05, "workers": workers, "augmentation_repeats": 2}
    recipe = tiny_recipe(tmp_path, data=damaged, **options)
    batches, sampler, _ = open_batches(recipe, tiny_config, None, ALONE)
    sampler.set_epoch(3)
    labels = [labels for _, labels in batches]
    assert {len(part) for part in labels} == {8}
    assert len(labels) == (46 // 8 if in_memory else 48 // 8)
    assert set(torch.cat(labels).tolist()) == {0, 1, 2}
    complaint = f"skipped: 2 of 48 images of {damaged}/train cannot be read: green/0.png, red/9.png\n"
    assert capsys.readouterr().err.count(complaint) == 1
    if isinstance(batches, ImageBatches):
        assert (len(batches.images), batches.targets.bincount().tolist()) == (46, [16, 15, 15])


@pytest.mark.parametrize("in_memory", [True, False])
def test_too_many_bad_images_raise_an_error(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    tiny_config: SuperViTConfig,
    damaged: Path,
    in_memory: bool,
) -> None:
    recipe = tiny_recipe(tmp_path, data=damaged, max_bad_images=0.04, **vary(in_memory))
    with pytest.raises(DataError, match=r"2 of 48 images .* more than --max-bad-images 0\.04 allows"):
        list(open_batches(recipe, tiny_config, None, ALONE)[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_answers_of_a_teacher_stay_with_their_images_if_other_images_are_bad(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    tiny_config: SuperViTConfig,
    teacher: Teacher,
    damaged: Path,
    in_memory: bool,
) -> None:
    options = ASKED_ONCE | vary(in_memory) | {"max_bad_images": 0.05, "label_smoothing": 0.0}
    recipe = tiny_recipe(tmp_path, data=damaged, **options)
    batches, _, _ = open_batches(recipe, tiny_config, teacher, ALONE)
    kept = torch.load(tmp_path / TARGETS_NAME, weights_only=True)["targets"]
    by_name = sorted(open_folder(damaged / "train", evaluation_transform(tiny_config)).files)
    for index, (path, label) in enumerate(by_name):
        only_the_label = functional.one_hot(torch.tensor(label), 3).float()
        is_bad = path.endswith(("green/0.png", "red/9.png"))
        assert torch.equal(kept[index], only_the_label) == is_bad
    targets = torch.cat([targets for _, targets in batches])
    shown = {tuple(target) for target in targets.tolist()}
    assert not shown & {(0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
    assert shown <= {tuple(target) for target in kept.tolist()}
    assert len(shown) > 35


def test_two_processes_ask_a_teacher_about_each_image_once(
    tmp_path: Path,
    tiny_recipe: MakeRecipe,
    tiny_config: SuperViTConfig,
    teacher: Teacher,
    torchrun: Callable[..., None],
) -> None:
    options = ASKED_ONCE | {"teacher_checkpoint": tmp_path / "teacher.pth", "teacher_side": 32}
    alone = ask(tiny_recipe(tmp_path / "alone", **options), tiny_config, teacher)
    recipe = tiny_recipe(tmp_path / "both", **options)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(exclude_unset=True))
    torchrun("training/two_teachings.py", tmp_path / "recipe.json", tmp_path / "found")
    kept = torch.load(tmp_path / "both" / TARGETS_NAME, weights_only=True)["targets"]
    assert torch.equal(kept, alone)
    asked = [torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2)]
    assert all(torch.equal(found["targets"], alone) for found in asked)
    assert [found["num_asked"] for found in asked] == [24, 24]
