from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.evaluation.evaluate import Evaluation
from models.evaluation.evaluate import evaluate as evaluate_subnetworks
from models.files.sources import find_checkpoint
from models.header import Header
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from models.supervit import DEIT_SMALL, SuperViT
from service.cli import main
from service.commands import evaluate as command

SHIPPED = "supervit-micro-cifar10"


@pytest.fixture
def data(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return plain_images(tmp_path / "data", checkpoint.class_names)


def plain_images(folder: Path, class_names: Sequence[str]) -> Path:
    """Write two plain images of each class to test/."""
    for index, name in enumerate(class_names):
        (folder / "test" / name).mkdir(parents=True)
        for shade in (0, 1):
            picture = Image.new("RGB", (20, 20), (25 * index, 100 * shade, 5))
            picture.save(folder / "test" / name / f"{shade}.png")
    return folder


def test_evaluate_measures_every_sub_network_and_writes_the_profile_into_the_checkpoint(
    checkpoint: Checkpoint, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.safetensors"
    unmeasured = ProfileTable.unmeasured(checkpoint.config)
    save_checkpoint(path, checkpoint.model, Header("tiny", checkpoint.config, checkpoint.class_names, unmeasured))
    command = ["evaluate", str(path), str(data), "--workers", "0", "--batch-size", "3"]
    (data / "test" / checkpoint.class_names[0] / "2.png").write_text("no picture")
    assert main([*command, "--rates-between"]) == 1
    assert "more than --max-bad-images 0.01 allows" in capsys.readouterr().err
    assert main([*command, "--rates-between", "--max-bad-images", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "images of test/, calibration error from the other " in printed
    assert f"accuracy from all {2 * len(checkpoint.class_names)} of test/" in printed
    measured = load_checkpoint(path)
    assert measured.profile.is_measured
    assert SubNetwork(4, 0.75) in measured.profile.by_subnetwork
    assert "expected calibration error" in printed
    assert all(row.temperature != 1 and row.calibration_error is not None for row in measured.profile.rows)
    assert all(0 < (row.top5 or 0) <= 1 for row in measured.profile.rows)
    assert all(f"{100 * (row.top1 or 0):.2f} %" in printed for row in measured.profile.rows)
    assert torch.equal(measured.model.head.weight, checkpoint.model.head.weight)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_writes_a_copy_of_a_shipped_checkpoint_into_the_current_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_checkpoint(SHIPPED)
    before = shipped.read_bytes(), set(shipped.parent.iterdir())
    data = plain_images(tmp_path / "data", load_checkpoint(shipped).class_names)
    command = ["evaluate", SHIPPED, str(data), "--workers", "0"]
    assert main(command) == 0
    copy = load_checkpoint(tmp_path / f"{SHIPPED}.safetensors")
    assert copy.profile.is_measured
    assert copy.profile != load_checkpoint(shipped).profile
    assert (shipped.read_bytes(), set(shipped.parent.iterdir())) == before
    capsys.readouterr()
    assert main(command) == 1
    assert capsys.readouterr().err == f"supervit: {SHIPPED}.safetensors: already exists and is not overwritten\n"


def test_evaluate_does_not_overwrite_a_file_named_like_its_copy_of_published_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The authors' weights are in another format, although the file has the suffix of ours."""
    published = tmp_path / "net.safetensors"
    save_file(SuperViT(DEIT_SMALL).state_dict(), published)
    assert not load_checkpoint(published).is_ours
    stranger = tmp_path / "net.safetensors.safetensors"
    stranger.touch()
    assert main(["evaluate", str(published), str(tmp_path)]) == 1
    assert f"{stranger}: already exists and is not overwritten" in capsys.readouterr().err


def test_evaluate_does_not_overwrite_a_file_named_like_its_copy_of_a_pth_file(
    checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unrelated = checkpoint_path.rename(tmp_path / "net.pth.safetensors")
    (tmp_path / "net.pth").write_bytes(unrelated.read_bytes())
    assert main(["evaluate", str(tmp_path / "net.pth"), str(tmp_path)]) == 1
    assert f"{unrelated}: already exists and is not overwritten" in capsys.readouterr().err


def test_evaluate_does_not_overwrite_a_checkpoint_that_was_replaced_meanwhile(
    checkpoint_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it belongs to a run that trains on."""
    newer = checkpoint_path.with_name("newer.safetensors")

    def measure_and_replace(checkpoint: Checkpoint, *others: Any, **options: Any) -> Evaluation:  # noqa: ANN401 - passed on
        header = Header("newer", checkpoint.config, checkpoint.class_names, checkpoint.profile)
        save_checkpoint(newer, checkpoint.model, header)
        newer.replace(checkpoint_path)
        return evaluate_subnetworks(checkpoint, *others, **options)

    monkeypatch.setattr(command, "evaluate_subnetworks", measure_and_replace)
    assert main(["evaluate", str(checkpoint_path), str(data), "--workers", "0"]) == 1
    assert f"{checkpoint_path}: was replaced while it was measured" in capsys.readouterr().err
    assert load_checkpoint(checkpoint_path).name == "newer"


def test_evaluate_rejects_a_data_set_without_val_or_test_folder(
    checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(checkpoint_path), str(tmp_path)]) == 1
    assert "neither val/ nor test/" in capsys.readouterr().err


def test_evaluate_with_half_saves_the_weights_in_half_precision(
    checkpoint: Checkpoint, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.safetensors"
    unmeasured = ProfileTable.unmeasured(checkpoint.config)
    save_checkpoint(path, checkpoint.model, Header("tiny", checkpoint.config, checkpoint.class_names, unmeasured))
    whole = load_checkpoint(path)
    assert main(["evaluate", str(path), str(data), "--workers", "0", "--half"]) == 0
    halved = load_checkpoint(path)
    assert halved.is_half
    assert halved.profile.is_measured
    assert main(["evaluate", str(path), str(data), "--workers", "0"]) == 0
    assert load_checkpoint(path).is_half  # the checkpoint stays in half precision
    for name, weight in halved.model.state_dict().items():
        original = whole.model.state_dict()[name]
        assert torch.equal(weight, original.half().float() if original.is_floating_point() else original), name
