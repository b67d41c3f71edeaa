from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.files.checkpoint_errors import CheckpointMismatchError
from models.header import Header
from models.profiles import ProfileTable
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT
from models.training.average import Average, average
from tests.models.conftest import CLASS_NAMES


@pytest.fixture
def pair(tmp_path: Path, tiny_config: SuperViTConfig) -> tuple[Path, Path]:
    """Two checkpoints of one architecture, with different weights and batch-norm statistics."""
    config = replace(tiny_config, flavour="lvvit", stem_width=4)
    paths = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        model = SuperViT(config)
        model.train()(torch.randn(4, 3, config.image_side, config.image_side))
        save_checkpoint(path, model, Header("it", config, CLASS_NAMES, ProfileTable.unmeasured(config)))
    return paths


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_and_batch_norm_statistics_are_averaged_by_the_share(
    pair: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    average(Average(first=pair[0], second=pair[1], output=tmp_path / "between.safetensors", share=share))
    between = load_checkpoint(tmp_path / "between.safetensors")
    first, second = (load_checkpoint(path).model.state_dict() for path in pair)
    assert between.name == "between"
    assert not between.profile.is_measured
    assert any("running_mean" in name for name in first)
    for name, weight in between.model.state_dict().items():
        expected = (1 - share) * first[name] + share * second[name] if weight.is_floating_point() else first[name]
        torch.testing.assert_close(weight, expected)


def test_checkpoints_of_different_classes_cannot_be_averaged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    second = load_checkpoint(pair[1])
    header = Header("it", second.config, ("other", *CLASS_NAMES[1:]), second.profile)
    save_checkpoint(pair[1], second.model, header)
    with pytest.raises(CheckpointMismatchError, match="differs in architecture, classes or patch grids from"):
        average(Average(first=pair[0], second=pair[1], output=tmp_path / "between.safetensors"))
    assert not (tmp_path / "between.safetensors").exists()


def retrained(path: Path, patch_grids: tuple[int, ...]) -> SuperViT:
    """Replace the checkpoint at `path` with one of other patch grids and a single keep rate; return its model."""
    old = load_checkpoint(path)
    config = replace(old.config, patch_grids=patch_grids, keep_rates=(1.0,))
    torch.manual_seed(2)
    model = SuperViT(config)
    save_checkpoint(path, model, Header("it", config, CLASS_NAMES, ProfileTable.unmeasured(config)))
    return model


def test_a_grid_that_the_second_checkpoint_lacks_keeps_its_position_embedding(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    first = load_checkpoint(pair[0])
    second = retrained(pair[1], first.config.patch_grids[-1:])
    average(Average(first=pair[0], second=pair[1], output=tmp_path / "between.safetensors"))
    between = load_checkpoint(tmp_path / "between.safetensors")
    *kept, largest = between.model.pos_embed_list
    *untrained, before = first.model.pos_embed_list
    assert between.config == first.config
    assert kept
    for embed, its_own in zip(kept, untrained, strict=True):
        torch.testing.assert_close(embed, its_own)
    torch.testing.assert_close(largest, (before + second.pos_embed_list[0]) / 2)
    torch.testing.assert_close(between.model.head.weight, (first.model.head.weight + second.head.weight) / 2)


def test_a_grid_that_the_first_checkpoint_lacks_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    retrained(pair[1], (5,))
    with pytest.raises(CheckpointMismatchError, match="patch grids"):
        average(Average(first=pair[0], second=pair[1], output=tmp_path / "between.safetensors"))
