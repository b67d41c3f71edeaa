from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import DataError
from models.processes import ALONE
from models.subnetwork import SuperViTConfig
from models.training.batches import find_targets, open_batches
from models.training.recipe import Recipe
from models.training.token_labels import cut_token_labels, read_map

# Nothing is normalised: the pixels are the labels.
PLAIN = SuperViTConfig(
    "lvvit", patch_grids=(4, 6), patch_kernel=16, num_classes=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


def save_map(path: Path, classes: object, weights: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, classes=np.asarray(classes), weights=np.asarray(weights))


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path]:
    """A data set of twelve pictures, and a folder of token labels that state how red and green each place is."""
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for index in range(6):
            width, height, level = int(rng.integers(100, 200)), int(rng.integers(100, 200)), rng.uniform(0.2, 0.5)

            def at(height: int, width: int, level: float = level) -> np.ndarray:
                columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
                return level * np.stack([columns, rows], axis=2)

            pixels = np.dstack([255 * at(height, width), np.zeros((height, width))]).round().astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{index}.png")
            classes = np.broadcast_to(np.array([0, 1], np.uint16), (14, 14, 2))
            save_map(tmp_path / "labels" / name / f"{index}.png.npz", classes, at(14, 14).astype(np.float16))
    return tmp_path / "data", tmp_path / "labels"


@pytest.fixture
def recipe(tmp_path: Path, labelled: tuple[Path, Path], tiny_recipe: Callable[..., Recipe]) -> Recipe:
    data, labels = labelled
    return tiny_recipe(tmp_path / "run", data=data, token_labels=labels, model="supervit_lvvit_small_patch16_224")


@pytest.mark.parametrize("small", [False, True])
def test_token_labels_follow_the_crop_and_the_mirror_of_each_image(recipe: Recipe, small: bool) -> None:
    config = replace(PLAIN, patch_kernel=10) if small else PLAIN  # at 60 px, pictures are shifted within their padding
    torch.manual_seed(0)
    batches, _, _ = open_batches(recipe, config, None, ALONE)
    checked = 0
    for _ in range(3):
        for images, labels, *maps in batches:
            targets = find_targets(recipe, config, None, images, labels, maps)
            assert targets.tokens is not None
            torch.testing.assert_close(targets.tokens.sum(dim=2), torch.ones(8, 36))
            red, green = torch.nn.functional.avg_pool2d(images[:, :2], config.patch_kernel).flatten(2).unbind(1)
            # What the two weights leave of 1 is shared equally, so only their difference can be compared.
            error = (targets.tokens[:, :, 0] - targets.tokens[:, :, 1] - (red - green)).abs().view(8, 6, 6)
            assert error[:, 1:-1, 1:-1].max() < 0.03
            checked += 1
    assert checked == 3


def test_an_image_without_token_labels_is_named_in_the_error(recipe: Recipe, labelled: tuple[Path, Path]) -> None:
    for path in (labelled[1] / "b").iterdir():
        path.unlink()
    batches, _, _ = open_batches(recipe, PLAIN, None, ALONE)
    with pytest.raises(DataError, match=r"labels/b/\d\.png\.npz: not readable as token labels: .*No such file"):
        list(batches)


def test_a_folder_without_token_labels_is_refused_when_batches_are_opened(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run/a/\d\.png\.npz: not readable as token labels"):
        open_batches(recipe.model_copy(update={"token_labels": tmp_path / "run"}), PLAIN, None, ALONE)


def test_token_labels_of_different_shapes_are_refused(recipe: Recipe, labelled: tuple[Path, Path]) -> None:
    for path in (labelled[1] / "b").iterdir():
        save_map(path, np.zeros((7, 7, 1), int), np.ones((7, 7, 1)))
    batches, _, _ = open_batches(recipe, PLAIN, None, ALONE)
    with pytest.raises(DataError, match=r"token labels must have the others' shape \(14, 14, 2\), not \(7, 7, 1\)"):
        list(batches)


@pytest.mark.parametrize(
    ("classes", "weights", "complaint"),
    [
        ([[[0, 1]]], [[[0.5]]], r"two arrays of \(h, w, k\), not \(1, 1, 2\) and \(1, 1, 1\)"),
        ([[0]], [[1.0]], r"two arrays of \(h, w, k\)"),
        (np.zeros((0, 1, 1), int), np.zeros((0, 1, 1)), r"two arrays of \(h, w, k\)"),
        ([[[0.0]]], [[[1.0]]], r"two arrays of \(h, w, k\)"),
        ([[[3]]], [[[1.0]]], "have class 3, but there are 3 classes"),
        ([[[-1]]], [[[1.0]]], "have class -1, but there are 3 classes"),
        ([[[0, 1]]], [[[0.8, 0.8]]], "must be probabilities"),
        ([[[0, 1]]], [[[0.8, -0.1]]], "must be probabilities"),
        ([[[0, 1]]], [[[0.8, np.nan]]], "must be probabilities"),
        ([[["a"]]], [[["b"]]], "not readable as token labels"),
    ],
)
def test_invalid_token_labels_are_refused_in_one_line_that_names_the_file(
    tmp_path: Path, classes: object, weights: object, complaint: str
) -> None:
    save_map(tmp_path / "x.npz", classes, weights)
    with pytest.raises(DataError, match=complaint) as caught:
        read_map(tmp_path / "x.npz", 3)
    assert str(caught.value).startswith(f"{tmp_path / 'x.npz'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_damaged_file_of_token_labels_is_named_in_the_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz: not readable as token labels"):
        read_map(tmp_path / "x.npz", 3)
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))  # one array, without a name
    with pytest.raises(DataError, match=r"x\.npz: not readable as token labels"):
        read_map(tmp_path / "x.npz", 3)
    np.savez(tmp_path / "x.npz", classes=np.zeros((1, 1, 1), int))
    with pytest.raises(DataError, match=r"x\.npz: not readable as token labels: .*weights"):
        read_map(tmp_path / "x.npz", 3)


def test_the_remaining_probability_is_shared_equally_by_all_classes() -> None:
    classes = torch.tensor([[[[2, 0], [1, 1]], [[0, 3], [3, 2]]]], dtype=torch.int32)
    weights = torch.tensor([[[[0.5, 0.1], [0.3, 0.3]], [[1.0, 0.0], [0.0, 0.0]]]])
    labels = cut_token_labels(classes, weights, torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]), 2, 4)
    expected = [[0.2, 0.1, 0.6, 0.1], [0.1, 0.7, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    torch.testing.assert_close(labels, torch.tensor([expected]))
