from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from models.files.checkpoint_errors import CheckpointMismatchError, UnreadableCheckpointError
from models.subnetwork import SuperViTConfig
from models.training.teacher import Adapter, Teacher


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    path = tmp_path / "teacher.pth"
    network = timm.create_model("test_vit", num_classes=3)
    torch.save({"model": network.state_dict()}, path)
    return path


@pytest.mark.usefixtures("in_float32")
def test_a_teacher_gets_the_same_images_at_its_own_size_and_normalisation(
    teacher_file: Path, tiny_config: SuperViTConfig
) -> None:
    config = replace(tiny_config, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    teacher = Teacher.load("test_vit", teacher_file, None, config)
    network = timm.create_model("test_vit", num_classes=3).eval()
    network.load_state_dict(torch.load(teacher_file, weights_only=True)["model"])
    data = timm.data.resolve_model_data_config(network)
    side = data["input_size"][-1]

    def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = network(normalised(pixels, data["mean"], data["std"])).softmax(dim=1)
    teacher_probs = teacher(normalised(pixels, config.mean, config.std))
    torch.testing.assert_close(teacher_probs, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(teacher(torch.zeros(5, 3, 16, 16)).sum(dim=1), torch.ones(5))


@pytest.mark.usefixtures("in_float32")
def test_a_supervit_teacher_answers_with_its_largest_subnetwork(tmp_path: Path) -> None:
    network = timm.create_model("supervit_lvvit_micro_patch4_32", num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    teacher = Teacher.load("supervit_lvvit_micro_patch4_32", tmp_path / "teacher.pth", None, network.config)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), network(images, network.config.largest).softmax(dim=1))


def test_a_convolutional_teacher_labels_every_place_by_applying_its_head_there(
    tiny_config: SuperViTConfig,
) -> None:
    torch.manual_seed(2)
    network = timm.create_model("test_efficientnet", num_classes=3).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    adapter = Adapter(network, tiny_config, 96)
    logits, places = adapter.label_patches(images)
    torch.testing.assert_close(logits, adapter(images))
    assert places.shape == (2, 3, 3, 3)
    features = network.forward_features(adapter.adapt(images))
    torch.testing.assert_close(places.permute(0, 2, 3, 1), network.classifier(features.permute(0, 2, 3, 1)))
    torch.testing.assert_close(places.mean(dim=(2, 3)), logits)  # its head averages the places, and is linear


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_transformer_teacher_labels_every_patch_token(tiny_config: SuperViTConfig, pool: str) -> None:
    torch.manual_seed(2)
    network = timm.create_model("test_vit", num_classes=3, global_pool=pool).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    adapter = Adapter(network, tiny_config, None)
    logits, places = adapter.label_patches(images)
    torch.testing.assert_close(logits, adapter(images))
    tokens = network.forward_features(adapter.adapt(images))[:, network.num_prefix_tokens :]
    assert places.shape[2] == places.shape[3] > 1
    torch.testing.assert_close(places.flatten(2).transpose(1, 2), network.head(network.fc_norm(tokens)))


def test_a_teacher_whose_features_have_the_channels_last_labels_every_place(tiny_config: SuperViTConfig) -> None:
    torch.manual_seed(2)
    tiny = {"img_size": 64, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4, "num_classes": 3}
    network = timm.create_model("swin_tiny_patch4_window7_224", **tiny).eval()
    adapter = Adapter(network, tiny_config, 64)
    logits, places = adapter.label_patches(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert places.shape == (2, 3, 8, 8)
    torch.testing.assert_close(places.mean(dim=(2, 3)), logits)


@pytest.mark.usefixtures("in_float32")
def test_labels_of_every_place_are_probabilities_on_the_grid_of_the_student(
    teacher_file: Path, tiny_config: SuperViTConfig
) -> None:
    teacher = Teacher.load("test_vit", teacher_file, None, tiny_config, everywhere=True)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    answers, places = teacher.label_patches(images)
    torch.testing.assert_close(answers, teacher(images))
    assert places.shape == (2, 16, 3)
    torch.testing.assert_close(places.sum(dim=2), torch.ones(2, 16))
    network = teacher.network
    assert isinstance(network, Adapter)
    own = network.label_patches(images)[1]
    assert own.shape == (2, 3, 10, 10)
    # Each of four patches per side is 2.5 places wide; a place counts less the further it is from the patch's centre.
    centres = (torch.arange(4) + 0.5) * 2.5
    shares = (1 - (torch.arange(10) + 0.5 - centres[:, None]).abs() / 2.5).clamp(min=0)
    shares = shares / shares.sum(dim=1, keepdim=True)
    expected = torch.einsum("ph,qw,bchw->bpqc", shares, shares, own).softmax(dim=3)
    torch.testing.assert_close(places, expected.flatten(1, 2), atol=1e-5, rtol=1e-4)


def test_a_teacher_that_cannot_label_every_place_is_refused_on_loading(tmp_path: Path) -> None:
    network = timm.create_model("supervit_lvvit_micro_patch4_32", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    name, path = "supervit_lvvit_micro_patch4_32", tmp_path / "teacher.pth"
    with pytest.raises(
        CheckpointMismatchError, match="cannot label every place of an image; leave out --teacher-tokens"
    ):
        Teacher.load(name, path, None, network.config, everywhere=True)


def test_a_teacher_that_does_not_support_the_image_size_is_refused_on_loading(tmp_path: Path) -> None:
    model = timm.create_model("supervit_lvvit_micro_patch4_32")
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(CheckpointMismatchError, match=r"does not support images of 96 pixels; give another --tea"):
        Teacher.load("supervit_lvvit_micro_patch4_32", tmp_path / "teacher.pth", 96, model.config)


def test_a_teacher_is_frozen(teacher_file: Path, tiny_config: SuperViTConfig) -> None:
    teacher = Teacher.load("test_vit", teacher_file, None, tiny_config)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.zeros(1, 3, 16, 16, requires_grad=True)).requires_grad


def test_weights_that_do_not_match_the_teacher_are_a_checkpoint_error(
    teacher_file: Path, tmp_path: Path, tiny_config: SuperViTConfig
) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"teacher\.pth: its weights do not match test_vit2"):
        Teacher.load("test_vit2", teacher_file, None, tiny_config)
    with pytest.raises(CheckpointMismatchError, match=r"teacher\.pth: its weights do not match test_vit"):
        Teacher.load("test_vit", teacher_file, None, replace(tiny_config, num_classes=4))
    with pytest.raises(CheckpointMismatchError, match=r"teacher\.pth: unknown timm model or tag test_vit\.no_such_tag"):
        Teacher.load("test_vit.no_such_tag", teacher_file, None, tiny_config)
    with pytest.raises(UnreadableCheckpointError, match="absent"):
        Teacher.load("test_vit", tmp_path / "absent", None, tiny_config)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that timm was asked to download; every download fails."""
    asked: list[str] = []

    def fail(name: str, pretrained: bool) -> None:
        assert pretrained
        asked.append(name)
        raise FileNotFoundError("no connection,\nno cache")

    monkeypatch.setattr(timm, "create_model", fail)
    return asked


def test_a_downloaded_teacher_must_have_as_many_classes_as_the_data(
    tiny_config: SuperViTConfig, downloads: list[str]
) -> None:
    """With another number of classes, timm silently gives the network a random head."""
    complaint = "test_vit: timm's weights have 1000 classes and the data has 3; give --teacher-checkpoint"
    with pytest.raises(CheckpointMismatchError, match=complaint):
        Teacher.load("test_vit", None, None, tiny_config)
    assert downloads == []


@pytest.mark.parametrize("name", ["test_vit", "test_vit.no_such_tag", "supervit_lvvit_micro_patch4_32"])
def test_a_teacher_that_cannot_be_downloaded_is_a_checkpoint_error(
    name: str, tiny_config: SuperViTConfig, downloads: list[str]
) -> None:
    with pytest.raises(UnreadableCheckpointError) as caught:
        Teacher.load(name, None, None, replace(tiny_config, num_classes=1000))
    assert str(caught.value).endswith(f"{name}: timm's weights are not available; give --teacher-checkpoint")
    assert downloads == ["test_vit"][: name == "test_vit"]


def test_a_teacher_computes_in_the_native_dtype_of_the_device_and_answers_in_float32(
    teacher_file: Path, tiny_config: SuperViTConfig, fast_precision: torch.dtype
) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    teacher = Teacher.load("test_vit", teacher_file, None, tiny_config)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        exact = teacher.network(images).softmax(dim=1)
    answer = teacher(images)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, exact, atol=0.02, rtol=0)
    assert torch.equal(answer, exact) == (fast_precision == torch.float32)
