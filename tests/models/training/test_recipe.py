import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from timm.data.auto_augment import rand_augment_transform

from models.checkpoint import save_checkpoint
from models.header import Header
from models.profiles import ProfileTable
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT
from models.training.recipe import LARGE_DATASET_IMAGES, LEARNING_RATES, Recipe, count_training_files
from tests.models.conftest import CLASS_NAMES


def data_of_size(tmp_path: Path, num_images: int) -> Path:
    """Make a data set of `num_images` images, most of them the same: one folder is linked into train/ repeatedly."""
    for size in (1000, num_images % 1000):
        (tmp_path / f"{size} images").mkdir(parents=True)
        for index in range(size):
            (tmp_path / f"{size} images" / f"{index}.png").touch()
    (tmp_path / "train").mkdir()
    for index in range(num_images // 1000):
        (tmp_path / "train" / str(index)).symlink_to(tmp_path / "1000 images", target_is_directory=True)
    (tmp_path / "train" / "rest").symlink_to(tmp_path / f"{num_images % 1000} images", target_is_directory=True)
    return tmp_path


def test_a_small_data_set_defaults_to_100_epochs_without_strong_augmentation(tmp_path: Path) -> None:
    recipe = Recipe(data=data_of_size(tmp_path, LARGE_DATASET_IMAGES - 1), output=tmp_path)
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.learning_rate) == (100, 64, "muon", 4e-2)
    assert (recipe.mixup, recipe.cutmix, recipe.rand_augment, recipe.random_erasing) == (0, 0, "", 0)
    assert (recipe.drop_path, recipe.ema_decay, recipe.augmentation_repeats) == (0, 0.999, 1)
    assert (recipe.mix_token, recipe.token_label_weight) == (False, 1)


def test_a_large_data_set_defaults_to_the_published_recipe_of_the_deit(tmp_path: Path) -> None:
    data = data_of_size(tmp_path, LARGE_DATASET_IMAGES)
    recipe = Recipe(data=data, output=tmp_path, model="supervit_deit_small_patch16_224")
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer, recipe.learning_rate) == (300, 256, "adamw", 5e-4)
    assert (recipe.mixup, recipe.cutmix, recipe.rand_augment) == (0.8, 1.0, "rand-m9-mstd0.5-inc1")
    assert (recipe.random_erasing, recipe.drop_path, recipe.mix_token) == (0.25, 0.1, False)
    assert (recipe.ema_decay, recipe.augmentation_repeats) == (0.99996, 3)
    assert (recipe.weight_decay, recipe.label_smoothing, recipe.warmup_epochs) == (0.05, 0.1, 5)


def test_a_large_data_set_defaults_to_the_published_recipe_of_the_lv_vit(tmp_path: Path) -> None:
    data = data_of_size(tmp_path, LARGE_DATASET_IMAGES)
    recipe = Recipe(data=data, output=tmp_path, model="supervit_lvvit_small_patch16_224")
    assert (recipe.epochs, recipe.optimizer, recipe.learning_rate) == (300, "adamw", 1.6e-3 * 512 / 1024)
    assert (recipe.mixup, recipe.cutmix, recipe.mix_token, recipe.token_label_weight) == (0, 0, True, 1)
    assert recipe.rand_augment.startswith("rand-m9")
    assert (recipe.random_erasing, recipe.drop_path, recipe.ema_decay) == (0.25, 0.1, 0.99992)
    assert (recipe.weight_decay, recipe.label_smoothing, recipe.warmup_epochs) == (0.05, 0.1, 5)
    assert recipe.augmentation_repeats == 1


@pytest.mark.parametrize(
    "options", [{"mix_token": True}, {"token_labels": "maps"}, {"token_label_weight": 0.5}, {"teacher_tokens": True}]
)
def test_options_for_the_labels_of_patch_tokens_are_refused_for_a_deit(
    tmp_path: Path, options: dict[str, object]
) -> None:
    (name,) = options
    common = {"data": tmp_path, "output": tmp_path, "teacher": "resnet18"} | options
    with pytest.raises(ValidationError, match=f"{name.replace('_', '-')} is only supported for an LV-ViT, not a DeiT"):
        Recipe.model_validate(common | {"model": "supervit_deit_micro_patch4_32"})
    Recipe.model_validate(common)
    off = {"data": tmp_path, "output": tmp_path, "model": "supervit_deit_micro_patch4_32", "mix_token": False}
    assert not Recipe.model_validate(off).mix_token


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"teacher_tokens": True, "teacher_once": True},
            "teacher-tokens cannot be combined with teacher-once or token-labels",
        ),
        (
            {"teacher_tokens": True, "token_labels": "maps"},
            "teacher-tokens cannot be combined with teacher-once or token-labels",
        ),
        ({"token_labels": "maps", "cutmix": 1.0}, "token-labels does not support mixup and cutmix"),
        ({"token_labels": "maps", "mixup": 0.8}, "token-labels does not support mixup and cutmix"),
    ],
)
def test_options_that_conflict_with_the_labels_of_patch_tokens_are_refused(
    tmp_path: Path, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Recipe.model_validate({"data": tmp_path, "output": tmp_path, "teacher": "resnet18"} | options)


def test_images_are_counted_in_the_class_folders_of_train(pictures: Path, tmp_path: Path) -> None:
    assert count_training_files(pictures) == 48
    for size in (LARGE_DATASET_IMAGES - 1, LARGE_DATASET_IMAGES):
        assert count_training_files(data_of_size(tmp_path / str(size), size)) == size


def test_images_in_linked_class_folders_are_counted(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for folder in (pictures / "train").iterdir():
        (tmp_path / "train" / folder.name).symlink_to(folder, target_is_directory=True)
    assert count_training_files(tmp_path) == 48


def test_given_options_override_the_defaults(tmp_path: Path) -> None:
    recipe = Recipe(data=tmp_path, output=tmp_path, epochs=7, mixup=0.3, rand_augment="rand-m5")
    assert (recipe.epochs, recipe.mixup, recipe.rand_augment, recipe.cutmix) == (7, 0.3, "rand-m5", 0)


def test_the_default_learning_rate_depends_on_the_optimizer(tmp_path: Path) -> None:
    assert Recipe(data=tmp_path, output=tmp_path, optimizer="adamw").learning_rate == 4e-3
    assert Recipe(data=tmp_path, output=tmp_path, optimizer="muon").learning_rate == 4e-2
    assert Recipe(data=tmp_path, output=tmp_path, optimizer="adamw", learning_rate=1e-3).learning_rate == 1e-3


def test_overrides_are_only_the_given_fields_of_the_model(tmp_path: Path) -> None:
    recipe = Recipe(data=tmp_path, output=tmp_path, width=64, prune_blocks=(1, 2), depth=None, seed=4, drop_path=0.1)
    assert recipe.overrides == {"width": 64, "prune_blocks": (1, 2)}
    assert Recipe(data=tmp_path, output=tmp_path).overrides == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("warmup_epochs", -1),
        ("weight_decay", -0.1),
        ("label_smoothing", 1),
        ("mixup", -1),
        ("cutmix", -1),
        ("random_erasing", 1.5),
        ("augmentation_repeats", 0),
        ("drop_path", 1),
        ("ema_decay", 1),
        ("teacher_weight", 1.1),
        ("token_label_weight", 0),  # nothing else trains the auxiliary head, whose logits evaluation adds
        ("holdout", 0),
        ("holdout", 1),
        ("max_bad_images", -0.1),
        ("max_bad_images", 1),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", "inf"),
        ("weight_decay", "inf"),
        ("mixup", "inf"),
        ("cutmix", "nan"),
        ("rand_augment", "foo"),
        ("rand_augment", "rand-foo"),
        ("rand_augment", "rand-x9"),
        ("rand_augment", "rand-m9-tfoo"),
        ("rand_augment", "rand-m9.5"),
        ("rand_augment", "rand-p1.5"),
        ("workers", -1),
        ("precision", "float8"),
        ("clip_grad", 0),
        ("clip_grad", "inf"),
        ("accumulate", 0),
        ("width", 0),
        ("surprise", 1),
    ],
)
def test_options_out_of_bounds_are_named_in_the_error(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Recipe.model_validate({"data": tmp_path, "output": tmp_path, name: value})


@pytest.mark.parametrize(
    "description",
    ["rand", "rand-m9-mstd0.5-inc1", "rand-n3-p0.3-mmax15-inc0", "rand-mstd1-tweights", "rand-m5-t3a", "rand-t3aw-p1"],
)
def test_every_accepted_description_of_rand_augment_can_be_built(tmp_path: Path, description: str) -> None:
    recipe = Recipe(data=tmp_path, output=tmp_path, rand_augment=description)
    assert rand_augment_transform(recipe.rand_augment) is not None


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixup_and_cutmix_need_an_even_batch_size(tmp_path: Path, name: str) -> None:
    options = {"data": tmp_path, "output": tmp_path, name: 0.8}
    with pytest.raises(ValidationError, match="mixup and cutmix need an even batch-size, not 7"):
        Recipe.model_validate(options | {"batch_size": 7})
    assert Recipe.model_validate(options | {"batch_size": 6}).batch_size == 6
    assert Recipe(data=tmp_path, output=tmp_path, batch_size=7).batch_size == 7


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_checkpoint": "teacher.pth"},
        {"teacher_side": 96},
        {"teacher_weight": 0.7},
        {"teacher_once": True},
        {"teacher_tokens": True},
    ],
)
def test_teacher_options_without_a_teacher_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(ValidationError, match=f"{name.replace('_', '-')} requires a teacher; give one with --teacher"):
        Recipe.model_validate({"data": tmp_path, "output": tmp_path} | options)
    Recipe.model_validate({"data": tmp_path, "output": tmp_path, "teacher": "resnet18"} | options)


def test_workers_default_to_the_share_of_the_cores_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Recipe(data=tmp_path, output=tmp_path).workers == 3
    assert Recipe(data=tmp_path, output=tmp_path, workers=0).workers == 0


def test_a_recipe_requires_data(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="data\n  Field required"):
        Recipe.model_validate({"output": tmp_path})


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = Recipe(data=tmp_path, output=tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.epochs = 3  # type: ignore[misc] # pydantic refuses it as well


def test_every_option_has_a_description_for_the_command_line() -> None:
    assert all(field.description for field in Recipe.model_fields.values())


@pytest.fixture
def weights_of_two_classes(tmp_path: Path, tiny_config: SuperViTConfig) -> Path:
    config = replace(tiny_config, num_classes=2)
    path = tmp_path / "two.safetensors"
    save_checkpoint(path, SuperViT(config), Header("two", config, ("cat", "dog"), ProfileTable.unmeasured(config)))
    return path


def test_initial_weights_of_other_classes_are_fine_tuned_by_default(
    weights_of_two_classes: Path, pictures: Path
) -> None:
    recipe = Recipe(data=pictures, output=Path("run"), init=weights_of_two_classes)
    assert recipe.fit_head
    assert (recipe.optimizer, recipe.layer_decay, recipe.smallest_crop) == ("adamw", 0.75, 0.3)
    asked = Recipe(data=pictures, output=Path("run"), init=weights_of_two_classes, optimizer="muon", layer_decay=1)
    assert (asked.optimizer, asked.layer_decay) == ("muon", 1)
    assert asked.learning_rate == LEARNING_RATES["muon"]["small"]


def test_initial_weights_of_the_same_classes_get_the_defaults_of_training_from_scratch(
    tmp_path: Path, tiny_config: SuperViTConfig, pictures: Path
) -> None:
    path = tmp_path / "three.safetensors"
    header = Header("three", tiny_config, CLASS_NAMES, ProfileTable.unmeasured(tiny_config))
    save_checkpoint(path, SuperViT(tiny_config), header)
    recipe = Recipe(data=pictures, output=Path("run"), init=path)
    assert not recipe.fit_head
    assert (recipe.optimizer, recipe.layer_decay, recipe.smallest_crop) == ("muon", 1.0, 0.08)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"fit_head": True}, "fit-head requires --init"),
        ({"teacher_self": True}, "teacher-self requires --init"),
        (
            {"teacher_self": True, "teacher": "resnet18", "init": Path("a.pth")},
            "teacher and teacher-self are mutually exclusive",
        ),
    ],
)
def test_invalid_combinations_of_options_about_initial_weights_are_refused(
    pictures: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Recipe(data=pictures, output=Path("run"), **options)
