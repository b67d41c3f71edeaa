from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.average import Average, average
from models.checkpoint import CheckpointMismatchError, Header, load_checkpoint, save_checkpoint
from models.profiles import ProfileTable
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT
from tests.models.conftest import CLASS_NAMES


@pytest.fixture
def pair(tmp_path: Path, tiny_config: SuperViTConfig) -> tuple[Path, Path]:
    """Two checkpoints of one architecture, with other weights and other statistics of their batch norms."""
    config = replace(tiny_config, flavour="lvvit", stem_width=4)
    paths = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        model = SuperViT(config)
        model.train()(torch.randn(4, 3, config.image_side, config.image_side))
        save_checkpoint(path, model, Header("it", config, CLASS_NAMES, ProfileTable.unmeasured(config)))
    return paths


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_and_statistics_lie_between_those_of_the_two(
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


def test_checkpoints_of_different_kinds_have_nothing_between_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    second = load_checkpoint(pair[1])
    header = Header("it", second.config, ("other", *CLASS_NAMES[1:]), second.profile)
    save_checkpoint(pair[1], second.model, header)
    with pytest.raises(CheckpointMismatchError, match="of another architecture or other classes than"):
        average(Average(first=pair[0], second=pair[1], output=tmp_path / "between.safetensors"))
    assert not (tmp_path / "between.safetensors").exists()
