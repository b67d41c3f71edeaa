from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from models.conversion.convert import convert, open_initial
from models.conversion.initial import InitialWeights
from models.conversion.options import Convert
from models.files.checkpoint_errors import CheckpointMismatchError, UnreadableCheckpointError
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from tests.models.conftest import CLASS_NAMES

Build = Callable[[SuperViTConfig], SuperViT]


def plain_deit(name: str = "deit_tiny_patch16_224", **options: object) -> Any:  # noqa: ANN401 - timm is untyped
    torch.manual_seed(5)
    tiny = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
    return timm.create_model(name, **(tiny | options)).eval()


def load_initial_weights(model: SuperViT, path: Path, class_names: tuple[str, ...] = CLASS_NAMES) -> None:
    initial = open_initial(path, num_heads=model.config.num_heads)
    initial.load_into(model, with_head=initial.has_head_for(class_names))


@pytest.fixture
def plain_file(tmp_path: Path) -> Path:
    path = tmp_path / "deit.pth"
    torch.save({"model": plain_deit().state_dict()}, path)
    return path


def test_the_largest_subnetwork_gives_the_logits_of_the_plain_deit_that_was_loaded(
    plain_file: Path, deit: SuperViT, images: Tensor
) -> None:
    load_initial_weights(deit, plain_file)
    expected = plain_deit()(images)
    torch.testing.assert_close(deit(images, SubNetwork(4, 1.0)), expected, atol=1e-5, rtol=1e-4)


def test_the_position_embedding_of_a_plain_deit_is_resampled_to_every_grid(plain_file: Path, deit: SuperViT) -> None:
    load_initial_weights(deit, plain_file)
    source = plain_deit().pos_embed
    assert torch.equal(deit.pos_embed_list[2], source)
    for index, grid in enumerate((2, 3)):
        resampled = deit.pos_embed_list[index]
        assert resampled.shape == (1, grid**2 + 1, 16)
        torch.testing.assert_close(resampled[:, :1], source[:, :1])
        assert resampled[:, 1:].std() < source[:, 1:].std()  # averaged over larger patches
        torch.testing.assert_close(resampled[:, 1:].mean(dim=1), source[:, 1:].mean(dim=1), atol=0.01, rtol=0)


def test_a_supervit_checkpoint_is_copied_whole(tiny_file: Path, config: SuperViTConfig, model: SuperViT) -> None:
    fresh = SuperViT(config)
    load_initial_weights(fresh, tiny_file)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_grids_that_the_checkpoint_lacks_are_resampled_from_its_nearest_grid(
    tiny_file: Path, config: SuperViTConfig, model: SuperViT
) -> None:
    assert config.patch_grids == (2, 3, 4)
    other = SuperViT(replace(config, patch_grids=(2, 4, 6)))
    load_initial_weights(other, tiny_file)
    of_2, _, of_4 = model.pos_embed_list
    assert torch.equal(other.pos_embed_list[0], of_2)
    assert torch.equal(other.pos_embed_list[1], of_4)
    new = other.pos_embed_list[2]
    assert new.shape == (1, 37, config.width)
    assert torch.equal(new[:, :1], of_4[:, :1])
    torch.testing.assert_close(new[:, 1:].mean(dim=1), of_4[:, 1:].mean(dim=1), atol=0.01, rtol=0)
    name = "blocks.2.mlp.fc1.weight"
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])


def test_the_larger_of_two_equally_near_grids_is_resampled(
    tmp_path: Path, tiny_config: SuperViTConfig, deit: SuperViT, build: Build
) -> None:
    source = build(replace(tiny_config, patch_grids=(2, 4)))
    torch.save(source.state_dict(), tmp_path / "two.pth")
    load_initial_weights(deit, tmp_path / "two.pth")
    of_2, of_4 = source.pos_embed_list
    assert not torch.equal(of_2[:, :1], of_4[:, :1])
    assert torch.equal(deit.pos_embed_list[1][:, :1], of_4[:, :1])  # grid 3; the class token's part is copied unchanged


def test_heads_stay_fresh_if_the_classes_differ(tiny_file: Path, config: SuperViTConfig, model: SuperViT) -> None:
    fresh = SuperViT(replace(config, num_classes=5))
    heads = {name: tensor.clone() for name, tensor in fresh.state_dict().items() if "head" in name}
    load_initial_weights(fresh, tiny_file, ("a", "b", "c", "d", "e"))
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in heads.items())
    name = "blocks.2.mlp.fc1.weight"
    assert torch.equal(fresh.state_dict()[name], model.state_dict()[name])


def test_equally_many_classes_of_other_names_count_as_other_classes(tiny_file: Path, plain_file: Path) -> None:
    assert open_initial(tiny_file).has_head_for(CLASS_NAMES)
    assert not open_initial(tiny_file).has_head_for(("blue", "red", "green"))
    assert open_initial(plain_file, num_heads=2).has_head_for(("any", "three", "names"))  # the file has no class names
    assert not open_initial(plain_file, num_heads=2).has_head_for(("two", "names"))


def test_imagenets_classes_are_the_same_by_description_and_by_wordnet_id(tmp_path: Path) -> None:
    imagenet = ImageNetInfo()
    path = tmp_path / "elastic.safetensors"
    vit = timm.create_model("test_vit", num_classes=1000)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    convert(Convert(vit=tmp_path / "vit.pth", output=path, name="test_vit"))
    ids = imagenet.label_names()
    assert open_initial(path).has_head_for(tuple(ids))
    assert open_initial(path).has_head_for(tuple(imagenet.label_descriptions()))
    assert not open_initial(path).has_head_for((*ids[1:], ids[0]))


def test_weights_for_another_number_of_heads_are_refused(tiny_file: Path, config: SuperViTConfig) -> None:
    other = SuperViT(replace(config, num_heads=2 * config.num_heads))
    with pytest.raises(CheckpointMismatchError, match=f"num_heads is {config.num_heads}, not {2 * config.num_heads}"):
        load_initial_weights(other, tiny_file)


def test_a_file_without_heads_leaves_the_heads_fresh(tmp_path: Path, model: SuperViT, config: SuperViTConfig) -> None:
    path = tmp_path / "headless.pth"
    torch.save({name: tensor for name, tensor in model.state_dict().items() if "head" not in name}, path)
    other = SuperViT(config)
    heads = {name: tensor.clone() for name, tensor in other.state_dict().items() if "head" in name}
    assert heads
    load_initial_weights(other, path)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in heads.items())
    name = "blocks.2.mlp.fc1.weight"
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])


def test_weights_of_another_width_or_depth_are_named_in_the_error(
    plain_file: Path, tiny_config: SuperViTConfig
) -> None:
    with pytest.raises(
        CheckpointMismatchError,
        match=r"deit\.pth: its weights do not match this model: 0 missing .* of the wrong shape",
    ):
        load_initial_weights(SuperViT(replace(tiny_config, width=20)), plain_file)
    with pytest.raises(CheckpointMismatchError, match=r"12 missing \['blocks\.3\.attn\.proj\.bias'"):
        load_initial_weights(SuperViT(replace(tiny_config, depth=4)), plain_file)


def test_weights_that_match_only_in_shape_are_refused(tmp_path: Path, deit: SuperViT) -> None:
    weights = {name: tensor for name, tensor in deit.state_dict().items() if not name.startswith("pos_embed")}
    positions = {4: deit.pos_embed_list[2].detach()}
    other = replace(deit.config, activation="quick_gelu")
    initial = InitialWeights(tmp_path / "clip.pth", weights, positions, other)
    with pytest.raises(CheckpointMismatchError, match="activation is quick_gelu, not gelu"):
        initial.load_into(deit, with_head=True)


def test_a_distilled_deit_is_refused_by_a_model_without_a_distillation_token(tmp_path: Path, deit: SuperViT) -> None:
    path = tmp_path / "distilled.pth"
    torch.save(plain_deit("deit_tiny_distilled_patch16_224").state_dict(), path)
    with pytest.raises(CheckpointMismatchError, match=r"of the wrong shape \['cls_token'"):
        load_initial_weights(deit, path)


def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path, deit: SuperViT) -> None:
    with pytest.raises(UnreadableCheckpointError, match="absent: no such file"):
        load_initial_weights(deit, tmp_path / "absent")
