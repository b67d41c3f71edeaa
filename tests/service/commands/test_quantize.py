from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.header import Header
from models.profiles import ProfileTable
from models.quantization import Quantization
from models.supervit import DEIT_SMALL, SuperViT
from service.cli import main
from service.commands.quantize import make_range, verdict


@pytest.fixture
def data(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """Write four images of noise, tinted by class, for each class in val/ and test/."""
    rng = np.random.default_rng(1)
    for part in ("val", "test"):
        for index, name in enumerate(checkpoint.class_names):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 120, (16, 16, 3)) + 20 * index
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def path(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    header = Header("tiny", checkpoint.config, checkpoint.class_names, checkpoint.profile)
    save_checkpoint(path, checkpoint.model, header)
    return path


def test_quantize_adds_int8_and_leaves_the_floating_point_checkpoint_unchanged(
    path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_checkpoint(path)
    output = path.with_name("int8.safetensors")
    assert main(["quantize", str(path), str(data), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    after = load_checkpoint(output)
    assert after.int8 is not None
    assert after.profile == before.profile
    assert all(after.model.state_dict()[name].equal(weight) for name, weight in before.model.state_dict().items())
    assert after.int8.profile.by_subnetwork.keys() == before.profile.by_subnetwork.keys()
    assert all(row.calibration_error is not None for row in after.int8.profile.rows)
    assert len({row.temperature for row in after.int8.profile.rows}) > 1
    # Activations after a norm have both signs and mean 0; those after GELU are never below -0.17.
    assert all(block.qkv.low < -0.5 and block.qkv.high > 0.5 for block in after.int8.ranges)
    assert all(-block.fc2.low < block.fc2.high for block in after.int8.ranges)
    assert ", int8, " in printed
    assert f"written to {output}" in printed
    assert load_checkpoint(path).int8 is None


def test_channels_are_smoothed_by_the_magnitudes_of_their_activations_and_weights() -> None:
    lows, highs = (
        torch.tensor([[-1.0, -16.0, 0.0], [-2.0, -1.0, -1.0]]),
        torch.tensor([[2.0, 1.0, 2.0], [1.0, 1.0, 1.0]]),
    )
    found = make_range(lows, highs, torch.tensor([1.0, 1.0, 1.0]))
    # The values are 8 times as large: 0.6 of the 3 octaves between the channels, in quarters of an octave.
    assert found.smoothing[1] - found.smoothing[0] == round(4 * 0.6 * 3) == 7
    assert found.smoothing[0] == found.smoothing[2]
    assert abs(sum(found.smoothing)) <= 1
    by_weights = make_range(lows, highs, torch.tensor([1.0, 1.0, 32.0]))
    assert by_weights.smoothing[2] - by_weights.smoothing[0] == -round(4 * 0.4 * 5) == -8
    largest = 16 / 2 ** (found.smoothing[1] / 4)
    assert -largest <= found.low < -0.8 * largest  # nine tenths of the way from the other image's value to this one's


def test_evaluate_keeps_the_int8_quantization_unless_it_rounds_the_weights(
    path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(path), str(data)]) == 0
    prepared = load_checkpoint(path).int8
    assert prepared is not None
    assert main(["evaluate", str(path), str(data), "--workers", "0"]) == 0
    assert load_checkpoint(path).int8 == prepared
    assert main(["evaluate", str(path), str(data), "--workers", "0", "--half"]) == 0
    assert "no longer prepared for int8" in capsys.readouterr().out
    assert load_checkpoint(path).int8 is None


def test_quantize_does_not_overwrite_another_file(path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = path.with_name("other.safetensors")
    other.write_bytes(b"weights of another")
    assert main(["quantize", str(path), str(data), "--output", str(other)]) == 1
    assert capsys.readouterr().err == f"supervit: {other}: already exists and is not overwritten\n"
    assert other.read_bytes() == b"weights of another"


def test_quantize_leaves_weights_in_another_format_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "net.safetensors"
    save_file(SuperViT(DEIT_SMALL).state_dict(), published)
    stranger = tmp_path / "net.safetensors.safetensors"
    stranger.touch()
    assert main(["quantize", str(published), str(tmp_path)]) == 1
    assert f"{stranger}: already exists and is not overwritten" in capsys.readouterr().err


def test_quantize_rejects_a_data_set_without_val_or_test_folder(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(path), str(tmp_path / "none")]) == 1
    assert "holds neither val/ nor test/" in capsys.readouterr().err


def test_the_verdict_names_the_sub_networks_that_lose_too_much_accuracy_in_8_bits(checkpoint: Checkpoint) -> None:
    def knowing(top1: float | None) -> ProfileTable:
        first, *others = checkpoint.profile.rows
        return ProfileTable((replace(first, top1=top1), *(replace(row, top1=top1 and 0.8) for row in others)))

    first = checkpoint.profile.cheapest.subnetwork
    told = [verdict(Quantization((), knowing(top1)), knowing(0.8)) for top1 in (0.7971, 0.796)]
    assert told[0] == "at most 0.29 points of top-1 lost compared with floating point"
    assert told[1].endswith(
        f"lost compared with floating point; more than 0.3 at {first}, served in floating point unless --precision int8"
    )
    assert "supervit evaluate" in verdict(Quantization((), knowing(None)), knowing(0.8))
