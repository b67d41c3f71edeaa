import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from models.data.augmentation import Augmentation, training_transform
from models.data.datasets import (
    NO_LABEL,
    ImageSet,
    TrainingSamples,
    digest_samples,
    list_classes,
    name_first,
    open_folder,
    open_training_data,
    stratified_order,
)
from models.data.images import Transform, evaluation_transform
from models.errors import DataError
from models.subnetwork import SuperViTConfig


def link(pictures: Path, root: Path, **splits: str) -> Path:
    """Make a data set of links to the splits of another."""
    for split, source in splits.items():
        (root / split).symlink_to(pictures / source, target_is_directory=True)
    return root


def varied(config: SuperViTConfig) -> Transform:
    return training_transform(config, Augmentation(None, 0.0))


def paths(images: ImageSet) -> set[str]:
    return {path for path, _ in images.files}


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("no picture")


def test_the_val_folder_is_used_for_validation_if_there_is_one(pictures: Path, tiny_config: SuperViTConfig) -> None:
    training, watched = open_training_data(pictures, tiny_config, varied(tiny_config), holdout=0.5, seed=0)
    assert (len(training), len(watched)) == (48, 12)
    image, label = watched[0]
    assert (image.dtype, image.shape, label) == (torch.uint8, (3, 16, 16), 0)
    image, label = training[47]
    assert (image.dtype, image.shape, label) == (torch.float32, (3, 16, 16), 2)


def test_a_test_folder_is_never_opened(pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig) -> None:
    data = link(pictures, tmp_path, train="train")
    (data / "test").write_text("not even a folder")
    training, watched = open_training_data(data, tiny_config, varied(tiny_config), holdout=0.25, seed=3)
    assert (len(training), len(watched)) == (36, 12)
    assert len(paths(training) | paths(watched)) == 48
    assert watched[0][0].dtype == torch.uint8
    assert training[0][0].dtype == torch.float32


def test_only_the_seed_decides_which_images_are_held_out(
    pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    data = link(pictures, tmp_path, train="train")
    parts = [paths(open_training_data(data, tiny_config, varied(tiny_config), 0.2, seed)[1]) for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]
    assert len(open_training_data(data, tiny_config, varied(tiny_config), 1e-6, 1)[1]) == 1


def test_the_same_share_of_every_class_is_held_out_and_each_class_keeps_an_image(
    pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    for name, count in (("blue", 16), ("green", 4), ("red", 1)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(count):
            shutil.copy(pictures / "train" / name / f"{index}.png", tmp_path / "train" / name)
    for holdout, expected in ((0.25, {0: 4, 1: 1}), (0.5, {0: 8, 1: 2}), (0.99, {0: 15, 1: 3})):
        training, watched = open_training_data(tmp_path, tiny_config, varied(tiny_config), holdout, seed=5)
        assert Counter(label for _, label in watched.files) == expected
        assert Counter(label for _, label in training.files) + Counter(expected) == {0: 16, 1: 4, 2: 1}
        assert not paths(training) & paths(watched)


def test_a_data_set_with_too_few_images_for_a_holdout_is_refused(
    pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    for name in ("blue", "red"):
        (tmp_path / "train" / name).mkdir(parents=True)
        shutil.copy(pictures / "train" / name / "0.png", tmp_path / "train" / name)
    with pytest.raises(DataError, match=f"{tmp_path}/train: no class has enough images to hold one out"):
        open_training_data(tmp_path, tiny_config, varied(tiny_config), 0.5, 0)


def test_every_prefix_of_a_stratified_order_holds_the_classes_in_proportion() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 4
    order = stratified_order(labels, seed=1)
    assert sorted(order) == list(range(64))
    for count in range(65):
        seen = Counter(labels[index] for index in order[:count])
        assert all(abs(seen[label] - count * size / 64) <= 1 for label, size in Counter(labels).items())
    assert stratified_order(labels, seed=2) != order


def test_a_folder_without_class_folders_is_named_in_the_error(tmp_path: Path, tiny_config: SuperViTConfig) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/train: not a folder of class folders"):
        open_training_data(tmp_path, tiny_config, varied(tiny_config), 0.1, 0)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}/train: not a folder of class folders"):
        list_classes(tmp_path / "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: not a folder"):
        list_classes(tmp_path / "file")


def test_a_class_folder_whose_name_is_not_utf8_is_named_in_the_error(tmp_path: Path) -> None:
    """Python represents a Latin-1 name, as from an old archive, like this."""
    for name in ("thé", "caf\udce9"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"the class folder 'caf\\udce9' has a name that is not UTF-8"):
        list_classes(tmp_path)


def test_a_class_without_images_is_named_in_the_error(
    pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "full").symlink_to(pictures / "train" / "red", target_is_directory=True)
    (tmp_path / "train" / "void").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}/train: .*void"):
        open_training_data(tmp_path, tiny_config, varied(tiny_config), 0.1, 0)


def test_classes_that_differ_between_val_and_train_are_named_in_the_error(
    pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    link(pictures, tmp_path, train="train")
    (tmp_path / "val").mkdir()
    for name in ("red", "pink", "grey", "teal", "gold"):
        (tmp_path / "val" / name).symlink_to(pictures / "val" / "red", target_is_directory=True)
    expected = (
        "its class folders differ from those of train/: 2 missing: blue, green; 4 extra: gold, grey, pink and 1 more"
    )
    with pytest.raises(DataError, match=f"^{tmp_path}/val: {expected}$"):
        open_training_data(tmp_path, tiny_config, varied(tiny_config), 0.1, 0)


def test_training_on_a_single_class_is_refused(pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "red").symlink_to(pictures / "train" / "red", target_is_directory=True)
    with pytest.raises(DataError, match=f"{tmp_path}/train: must have at least two class folders"):
        open_training_data(tmp_path, tiny_config, varied(tiny_config), 0.1, 0)
    assert len(open_folder(tmp_path / "train", evaluation_transform(tiny_config))) == 16


def test_name_first_lists_a_few_names_and_counts_the_rest() -> None:
    assert name_first(["a", "b", "c"]) == "a, b, c"
    assert name_first(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_files_with_unsupported_extensions_are_counted_by_extension(
    pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures / "val", tmp_path / "val")
    spoil(tmp_path / "val" / "red", "1.heic", "2.HEIC", "README", "ok.png")
    images = open_folder(tmp_path / "val", evaluation_transform(tiny_config))
    assert len(images) == 13
    images.report_skipped_files()
    expected = f"{tmp_path}/val: skipped files with unsupported extensions: 2 .heic, 1 without extension\n"
    assert capsys.readouterr().err == expected
    open_folder(pictures / "val", evaluation_transform(tiny_config)).report_skipped_files()
    assert capsys.readouterr().err == ""


@pytest.fixture
def damaged(pictures: Path, tmp_path: Path) -> Path:
    """A folder of 12 images in three classes, of which two cannot be read."""
    shutil.copytree(pictures / "val", tmp_path / "damaged")
    spoil(tmp_path / "damaged", "blue/1.png", "red/3.png")
    return tmp_path / "damaged"


def test_a_bad_image_keeps_its_place_without_a_label_and_is_reported_once(
    damaged: Path, tiny_config: SuperViTConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_folder(damaged, evaluation_transform(tiny_config), max_bad_images=0.2)
    samples = [images[index] for index in range(12)]
    assert [label for _, label in samples] == [0, NO_LABEL, 0, 0, 1, 1, 1, 1, 2, 2, 2, NO_LABEL]
    assert {(image.shape, image.dtype) for image, _ in samples} == {((3, 16, 16), torch.uint8)}
    assert images.is_bad.nonzero()[:, 0].tolist() == [1, 11]
    assert capsys.readouterr().err == ""
    images.report()
    complaint = f"\nskipped: 2 of 12 images of {damaged} cannot be read: blue/1.png, red/3.png\n"
    assert capsys.readouterr().err == complaint
    images.report()
    images.with_transform(varied(tiny_config)).report()
    assert capsys.readouterr().err == ""


def test_an_image_that_was_once_bad_is_not_read_again(damaged: Path, tiny_config: SuperViTConfig) -> None:
    """Otherwise an image that one pass left out would return in the next, without the answer of a teacher."""
    images = open_folder(damaged, evaluation_transform(tiny_config), max_bad_images=0.2)
    assert images[1][1] == NO_LABEL
    shutil.copy(damaged / "blue" / "0.png", damaged / "blue" / "1.png")
    assert images[1][1] == NO_LABEL
    assert images.with_transform(varied(tiny_config))[1][1] == NO_LABEL


def test_more_bad_images_than_allowed_raise_a_one_line_error(damaged: Path, tiny_config: SuperViTConfig) -> None:
    images = open_folder(damaged, evaluation_transform(tiny_config), max_bad_images=0.1)
    assert images[1][1] == NO_LABEL  # one of twelve is less than a tenth
    with pytest.raises(DataError) as caught:
        images[11]
    assert str(caught.value).startswith(f"{damaged}/red/3.png: not a readable image: cannot identify image file")
    assert str(caught.value).endswith(
        f"; 2 of 12 images of {damaged} cannot be read: blue/1.png, red/3.png, more than --max-bad-images 0.1 allows"
    )
    assert "\n" not in str(caught.value)


def test_training_replaces_a_bad_image_with_the_next_image_and_its_target(
    damaged: Path, tiny_config: SuperViTConfig
) -> None:
    images = open_folder(damaged, evaluation_transform(tiny_config), max_bad_images=0.2)
    plain = TrainingSamples(images, None)
    assert [plain[index][1] for index in range(len(plain))] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 0]
    targets = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    taught = TrainingSamples(images, targets)
    for index, expected in ((0, 0), (1, 2), (2, 2), (11, 0)):
        image, target = taught[index]
        assert torch.equal(image, images[expected][0])
        assert isinstance(target, torch.Tensor)
        assert torch.equal(target, targets[expected])


def test_the_digest_of_samples_depends_only_on_files_labels_and_order(
    tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    transform = evaluation_transform(tiny_config)
    files = [(os.fspath(tmp_path / "a.png"), 0), (os.fspath(tmp_path / "b.png"), 1)]
    choices = [files, files[::-1], files[:1], [files[0], (files[1][0], 0)], [(str(tmp_path / "c.png"), 0), files[1]]]
    assert len({digest_samples(ImageSet(tmp_path, choice, transform, 0.0)) for choice in choices}) == len(choices)
    moved = [(os.fspath(tmp_path / "moved" / name), label) for label, name in enumerate(("a.png", "b.png"))]
    same = digest_samples(ImageSet(tmp_path / "moved", moved, transform, 0.0))
    assert same == digest_samples(ImageSet(tmp_path, files, varied(tiny_config), 0.5))
