from pathlib import Path

import pytest
import timm
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from models.errors import DataError
from models.files.checkpoint_errors import CheckpointMismatchError
from models.subnetwork import SuperViTConfig
from models.training.finetune import Finetune, finetune, load_network
from models.training.teacher import Teacher


@pytest.fixture
def imagenet_file(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    path = tmp_path / "imagenet.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


def test_a_fine_tuned_network_learns_the_data_and_loads_as_a_teacher(
    tmp_path: Path, pictures: Path, imagenet_file: Path, tiny_config: SuperViTConfig
) -> None:
    output = tmp_path / "teacher.pth"
    options = Finetune(
        data=pictures,
        output=output,
        model="test_vit",
        weights=imagenet_file,
        side=32,
        epochs=8,
        batch_size=8,
        workers=0,
    )
    assert finetune(options) >= 0.9
    teacher = Teacher.load("test_vit", output, 32, tiny_config)
    assert teacher(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


def test_the_seed_determines_the_order_of_the_images(
    tmp_path: Path, pictures: Path, imagenet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[list[int]] = []

    def note(sampler: RepeatAugSampler, epoch: int) -> None:
        sampler.epoch = epoch
        orders.append(list(sampler))

    monkeypatch.setattr(RepeatAugSampler, "set_epoch", note)
    for seed in (0, 1, 1):
        finetune(
            Finetune(
                data=pictures,
                output=tmp_path / "teacher.pth",
                model="test_vit",
                weights=imagenet_file,
                side=32,
                epochs=2,
                batch_size=48,
                seed=seed,
                workers=0,
            )
        )
    assert orders[2:4] == orders[4:6]
    assert len({tuple(order) for order in orders}) == 4


def test_all_but_the_last_layer_is_loaded_even_if_the_weights_have_other_names(
    tmp_path: Path, imagenet_file: Path
) -> None:
    weights = torch.load(imagenet_file, weights_only=True)
    torch.save({f"other.{number}": weight for number, weight in enumerate(weights.values())}, tmp_path / "renamed.pth")
    for path in (imagenet_file, tmp_path / "renamed.pth"):
        network = load_network("test_vit", path, 3).state_dict()
        assert network["head.weight"].shape[0] == 3
        assert all(torch.equal(network[name], weights[name]) for name in weights if not name.startswith("head."))


def test_weights_of_an_earlier_run_keep_their_last_layer_for_the_same_number_of_classes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save(weights, tmp_path / "teacher.pth")
    network = load_network("test_vit", tmp_path / "teacher.pth", 3).state_dict()
    assert all(torch.equal(network[name], weight) for name, weight in weights.items())
    assert load_network("test_vit", tmp_path / "teacher.pth", 5).state_dict()["head.weight"].shape[0] == 5


def test_weights_of_another_network_are_refused(imagenet_file: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"imagenet\.pth: its weights do not match test_vit2"):
        load_network("test_vit2", imagenet_file, 3)


def test_weights_that_lack_a_tensor_are_refused_under_any_names(imagenet_file: Path, tmp_path: Path) -> None:
    weights = torch.load(imagenet_file, weights_only=True)
    del weights["norm.weight"]
    torch.save(weights, tmp_path / "without_norm.pth")
    torch.save({f"other.{number}": weight for number, weight in enumerate(weights.values())}, tmp_path / "renamed.pth")
    for name in ("without_norm.pth", "renamed.pth"):
        with pytest.raises(CheckpointMismatchError, match=f"{name}: its weights do not match test_vit"):
            load_network("test_vit", tmp_path / name, 3)


def test_an_output_that_cannot_be_written_is_an_os_error(tmp_path: Path, pictures: Path, imagenet_file: Path) -> None:
    (tmp_path / "file").touch()
    options = Finetune(data=pictures, output=tmp_path / "file" / "teacher.pth", model="test_vit", weights=imagenet_file)
    with pytest.raises(OSError, match="file"):
        finetune(options)


def test_environment_variables_are_not_read_as_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EPOCHS", "77")
    assert Finetune(data=tmp_path, output=tmp_path, weights=tmp_path).epochs == 2


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path, pictures: Path, imagenet_file: Path) -> None:
    output = tmp_path / "teacher.pth"
    options = Finetune(data=pictures, output=output, model="test_vit", weights=imagenet_file, side=32, batch_size=49)
    with pytest.raises(DataError, match="48 training images do not fill a batch of 49"):
        finetune(options)
