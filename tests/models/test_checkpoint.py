import argparse
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from models import checkpoint
from models.checkpoint import (
    HEADER_KEY,
    Checkpoint,
    digest,
    load_checkpoint,
    read_weights,
    round_to_half,
    save_checkpoint,
)
from models.files.checkpoint_errors import CheckpointError, CheckpointMismatchError, UnreadableCheckpointError
from models.files.sources import SHIPPED_FOLDER
from models.flops import count_macs
from models.header import Header
from models.profiles import ProfileTable, SubNetworkProfile
from models.quantization import BlockRanges, Quantization, Range
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import DEIT_SMALL, LVVIT_SMALL, SuperViT
from tests.models.conftest import CLASS_NAMES

Weights = dict[str, Tensor]
Draw = Callable[[SuperViTConfig], Weights]


def zeros_like(weights: Weights) -> Weights:
    """Return zero weights that each expand one element: they take no disk space, but loading them would be refused."""
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in weights.items()}


def rewrite(path: Path, change: Callable[[Weights, dict[str, Any]], None]) -> None:
    """Change the weights and the header of a file in our own format."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
    weights = safetensors.torch.load_file(path)
    change(weights, header)
    safetensors.torch.save_file(weights, path, metadata={HEADER_KEY: json.dumps(header)})


def check_parity(checkpoint: Checkpoint, images: Tensor, expected: dict[str, Tensor]) -> None:
    cheapest = checkpoint.config.subnetworks[0]
    with torch.inference_mode():
        logits = checkpoint.model(images, cheapest)
    reference = expected[checkpoint.config.flavour][0]
    torch.testing.assert_close(logits[:, expected["classes"]], reference, atol=1e-4, rtol=0)


def test_a_saved_checkpoint_loads_unchanged(
    tmp_path: Path, model: SuperViT, config: SuperViTConfig, images: Tensor
) -> None:
    rows = tuple(
        SubNetworkProfile(subnetwork, count_macs(config, subnetwork), 0.5 + index / 100, 0.9)
        for index, subnetwork in enumerate(config.subnetworks)
    )
    header = Header("tiny", config, ("a", "b", "ç"), ProfileTable(rows))
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, model.train(), header)
    loaded = load_checkpoint(str(path))
    assert (loaded.name, loaded.config, loaded.class_names) == ("tiny", config, ("a", "b", "ç"))
    assert loaded.profile == header.profile
    assert not loaded.model.training
    assert loaded.version == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert list(tmp_path.iterdir()) == [path]
    model.eval()
    for subnetwork in config.subnetworks:
        assert torch.equal(loaded.model(images, subnetwork), model(images, subnetwork))


def test_a_checkpoint_replaced_while_it_loads_differs_in_version_from_the_new_file(
    tmp_path: Path, model: SuperViT, config: SuperViTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher that compares versions loads once too often, but misses no change."""
    rows = tuple(SubNetworkProfile(each, count_macs(config, each)) for each in config.subnetworks)
    path, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    for place in (path, other):
        save_checkpoint(place, model, Header(place.stem, config, ("a", "b", "c"), ProfileTable(rows)))

    def digest_and_replace(place: Path) -> str:
        version = digest(place)
        other.replace(place)
        return version

    monkeypatch.setattr(checkpoint, "digest", digest_and_replace)
    loaded = load_checkpoint(path)
    assert loaded.name == "other"
    assert loaded.version != digest(path)


def quantized(config: SuperViTConfig, blocks: int | None = None) -> Quantization:
    smoothing = tuple(range(-8, config.width - 8))
    block = BlockRanges(Range.of(-1.5, 2.5, smoothing), Range.of(-1.0, 1.0), Range.of(-2.0, 3.0), Range.of(-0.17, 4.0))
    return Quantization((block,) * (config.depth if blocks is None else blocks), ProfileTable.unmeasured(config))


def test_an_int8_quantization_is_saved_and_loaded_and_a_file_without_one_loads(
    tmp_path: Path, model: SuperViT, tiny_header: Header, tiny_file: Path
) -> None:
    path = tmp_path / "int8.safetensors"
    int8 = quantized(tiny_header.config)
    save_checkpoint(path, model, replace(tiny_header, int8=int8))
    assert load_checkpoint(path).int8 == int8
    rewrite(tiny_file, lambda _, header: header.pop("int8"))  # as files were before quantization was added
    assert load_checkpoint(tiny_file).int8 is None


def test_an_int8_quantization_that_does_not_fit_the_model_is_refused(tiny_header: Header) -> None:
    config = tiny_header.config
    with pytest.raises(ValueError, match=f"2 blocks are quantised, but the model has {config.depth}"):
        replace(tiny_header, int8=quantized(config, blocks=2))
    narrow = replace(quantized(config).ranges[0], fc2=Range.of(-1.0, 1.0, (1,) * config.width))
    with pytest.raises(ValueError, match=f"fc2 must smooth none or all of {config.mlp_width} channels"):
        replace(tiny_header, int8=replace(quantized(config), ranges=(narrow,) * config.depth))
    other = ProfileTable.unmeasured(replace(config, patch_grids=config.patch_grids[1:]))
    with pytest.raises(ValueError, match="the profile has no row for grid 2"):
        replace(tiny_header, int8=replace(quantized(config), profile=other))


def test_overwriting_a_file_does_not_change_the_model_loaded_from_it(
    tiny_file: Path, tmp_path: Path, config: SuperViTConfig, images: Tensor
) -> None:
    path = tmp_path / "live.safetensors"
    shutil.copy(tiny_file, path)
    loaded = load_checkpoint(path)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with path.open("r+b") as file:  # as `cp` does: the file itself, not another one renamed to it
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    path.write_bytes(b"")
    assert loaded.model(images, config.largest).isfinite().all()


def test_a_saved_checkpoint_has_the_permissions_that_the_umask_allows(
    tmp_path: Path, model: SuperViT, tiny_header: Header
) -> None:
    ordinary, saved = tmp_path / "ordinary", tmp_path / "saved.safetensors"
    ordinary.touch()
    save_checkpoint(saved, model, tiny_header)
    assert saved.stat().st_mode == ordinary.stat().st_mode


def test_a_failed_save_leaves_the_existing_file_unchanged(
    tiny_file: Path, model: SuperViT, tiny_header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny_file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tiny_file, SuperViT(model.config), tiny_header)
    assert tiny_file.read_bytes() == before


def test_a_half_precision_checkpoint_is_saved_again_without_further_rounding(
    tmp_path: Path, model: SuperViT, config: SuperViTConfig
) -> None:
    header = Header("tiny", config, ("a", "b", "c"), ProfileTable.unmeasured(config))
    with torch.no_grad():
        model.head.weight[0, 0] = 70_000.0  # float16 ends at 65,504
        model.norm.bias.fill_(1e-7)
    whole, half, again = (tmp_path / f"{name}.safetensors" for name in ("whole", "half", "again"))
    save_checkpoint(whole, model, header)
    save_checkpoint(half, model, header, half=True)
    loaded = load_checkpoint(half)
    assert (load_checkpoint(whole).is_half, loaded.is_half) == (False, True)
    save_checkpoint(again, loaded.model, header, half=loaded.is_half)
    assert again.read_bytes() == half.read_bytes()
    stored = safetensors.torch.load_file(half)
    original = model.state_dict()
    kept = {name for name, weight in stored.items() if weight.dtype == torch.float32}
    statistics = {name for name in original if name.endswith(("running_mean", "running_var"))}
    assert kept == {"head.weight", "norm.bias"} | statistics
    assert bool(statistics) == (config.flavour == "lvvit")
    for name, weight in loaded.model.state_dict().items():
        expected = original[name]
        assert weight.dtype == expected.dtype
        assert torch.equal(
            weight, expected if name in kept or not weight.is_floating_point() else expected.half().float()
        )


def test_a_file_of_mixed_precision_does_not_count_as_half_precision(tiny_file: Path) -> None:
    def halve_the_head(weights: Weights, _: dict[str, Any]) -> None:
        weights["head.weight"] = weights["head.weight"].half()

    rewrite(tiny_file, halve_the_head)
    assert not load_checkpoint(tiny_file).is_half


def test_half_precision_weights_load_as_float32(tiny_file: Path, model: SuperViT) -> None:
    def halve(weights: Weights, _: dict[str, Any]) -> None:
        weights |= {name: tensor.half() for name, tensor in weights.items() if tensor.is_floating_point()}

    rewrite(tiny_file, halve)
    loaded = load_checkpoint(tiny_file).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.head.weight, model.head.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "published_top1"),
    [
        (DEIT_SMALL, (73.75, 75.28, 75.79, 77.32, 78.31, 78.53, 78.91, 79.62, 79.87, 79.95, 80.50, 80.62)),
        (LVVIT_SMALL, (76.64, 79.82, 80.71, 79.81, 81.73, 82.24, 81.12, 82.59, 82.94, 82.11, 83.15, 83.47)),
    ],
    ids=["deit", "lvvit"],
)
def test_both_published_layouts_load_with_the_published_accuracy_and_give_the_reference_logits(
    tmp_path: Path,
    config: SuperViTConfig,
    published_top1: tuple[float, ...],
    drawn_weights: Draw,
    parity_images: Tensor,
    parity_logits: dict[str, Tensor],
) -> None:
    weights = drawn_weights(config)
    decoy = zeros_like(weights)
    args = argparse.Namespace(model="super", batch_size=256, data_path="imagenet")
    common = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 299, "args": args}
    layouts: dict[str, dict[str, Any]] = {
        "deit": {"model": weights, "lr_scheduler": {"t": 1}, "model_ema": decoy, "scaler": {"scale": 65536.0}},
        "lvvit": {"state_dict": decoy, "arch": "super", "version": 2, "state_dict_ema": weights, "metric": 83.47},
    }
    path = tmp_path / "published.pth"
    torch.save(common | layouts[config.flavour], path)
    loaded = load_checkpoint(path)
    assert loaded.config == config
    assert loaded.name.startswith(f"supervit_{config.flavour}_small")
    assert loaded.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    check_parity(loaded, parity_images, parity_logits)
    top1 = [loaded.profile.by_subnetwork[subnetwork].top1 for subnetwork in config.subnetworks]
    assert top1 == [round(percent / 100, 4) for percent in published_top1]
    assert len(loaded.class_names) == 1000
    assert loaded.class_names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert all(row.macs == count_macs(config, row.subnetwork) for row in loaded.profile.rows)


@pytest.mark.parametrize("layout", ["bare", "module.", "legacy pickle", "safetensors"])
def test_a_bare_state_dict_gives_the_reference_logits_in_every_file_layout(
    tmp_path: Path, layout: str, drawn_weights: Draw, parity_images: Tensor, parity_logits: dict[str, Tensor]
) -> None:
    weights = drawn_weights(DEIT_SMALL)
    path = tmp_path / "bare"
    if layout == "safetensors":
        safetensors.torch.save_file(weights, path)
    elif layout == "module.":
        torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=layout == "bare")
    loaded = load_checkpoint(path)
    assert loaded.profile.is_measured
    check_parity(loaded, parity_images, parity_logits)


@pytest.mark.parametrize("config", [DEIT_SMALL, LVVIT_SMALL], ids=["deit", "lvvit"])
def test_a_published_checkpoint_fine_tuned_to_ten_classes_has_unknown_accuracy(
    tmp_path: Path, config: SuperViTConfig, drawn_weights: Draw
) -> None:
    weights = {name: torch.zeros_like(tensor) for name, tensor in drawn_weights(config).items()}
    heads = [name for name in weights if name.startswith(("head.", "aux_head."))]
    weights |= {name: weights[name][:10] for name in heads}
    path = tmp_path / "ten.pth"
    torch.save({"model": weights}, path)
    loaded = load_checkpoint(path)
    assert loaded.config == replace(config, num_classes=10)
    assert loaded.class_names[:2] + loaded.class_names[9:] == ("class 0", "class 1", "class 9")
    assert not any(row.top1 for row in loaded.profile.rows)


def test_weights_of_a_plain_model_can_be_read_unchecked(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pth"
    torch.save({"module.fc.weight": torch.ones(2, 2, dtype=torch.float16), "steps": torch.tensor(3)}, path)
    weights = read_weights(path)
    assert weights["fc.weight"].dtype == torch.float32
    assert weights["steps"].item() == 3


class Malice:
    """An object that creates a folder when it is unpickled without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def write_whatever_is_no_checkpoint(path: Path, what: str) -> None:
    whole = path.with_name("whole")
    torch.save({"head.weight": torch.ones(100, 100)}, whole)
    contents: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "text": lambda: b"once upon a time there was a checkpoint\n" * 20,
        "json": lambda: b'{"model": "supervit", "weights": [1, 2, 3]}',
        "random": lambda: random.Random(1).randbytes(4000),
        "truncated zip": lambda: whole.read_bytes()[:20_000],
        "header length beyond the end": lambda: (10**6).to_bytes(8, "little") + b'{"a":1}',
        "list": lambda: pickle.dumps([1, 2, 3]),
    }
    path.write_bytes(contents[what]())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch's, about Python's own pickles
@pytest.mark.parametrize(
    "what", ["empty", "text", "json", "random", "truncated zip", "header length beyond the end", "list"]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_not_a_checkpoint_is_named_in_the_error(tmp_path: Path, what: str, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    write_whatever_is_no_checkpoint(path, what)
    for read in (load_checkpoint, read_weights):
        with pytest.raises(UnreadableCheckpointError, match=f"broken{suffix}: "):
            read(path)


def test_a_missing_file_a_folder_and_a_device_are_named_in_the_error(tmp_path: Path) -> None:
    for path, complaint in (
        (tmp_path / "absent.pth", "no such file"),
        (tmp_path, "not a regular file"),
        (Path(os.devnull), "not a regular file"),
    ):
        with pytest.raises(UnreadableCheckpointError, match=f"{path}: {complaint}"):
            load_checkpoint(path)
    with pytest.raises(UnreadableCheckpointError, match="cannot be read"):
        load_checkpoint("x" * 5000)


def test_a_truncated_supervit_checkpoint_is_unreadable(tiny_file: Path) -> None:
    whole = tiny_file.read_bytes()
    for length in (8, 9, 100, len(whole) // 2, len(whole) - 1):
        tiny_file.write_bytes(whole[:length])
        with pytest.raises(UnreadableCheckpointError):
            load_checkpoint(tiny_file)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")  # torch's
@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        torch.ones(2),
        {},
        {"model": {}},
        {"epoch": 3},
        {1: torch.ones(2)},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.empty(2, device="meta")},
    ],
    ids=["list", "tensor", "nothing", "no weights", "no tensors", "no names", "sparse", "meta"],
)
def test_a_pickle_of_anything_but_weights_is_unreadable(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(UnreadableCheckpointError, match=r"other\.pth: .*not a state dict"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # torch's, as they are deprecated
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch's, about its own code
def test_quantized_weights_are_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "quantized.pth"
    torch.save({"cls_token": torch.quantize_per_tensor(torch.ones(1, 1, 384), 0.1, 0, torch.quint8)}, path)
    with pytest.raises(UnreadableCheckpointError, match="'cls_token' is not a weight"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch's, about Python's own pickles
def test_a_malicious_pickle_is_refused_before_it_runs(tmp_path: Path) -> None:
    folder, path = tmp_path / "made", tmp_path / "malicious.pth"
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": Malice(folder)}, path)
    with pytest.raises(UnreadableCheckpointError, match=r"holds code, which is not run: it refers to posix\.mkdir$"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Malice(folder)))
    with pytest.raises(UnreadableCheckpointError, match=r"holds code, which is not run: it refers to posix\.mkdir$"):
        load_checkpoint(path)
    assert not folder.exists()
    pickle.loads(path.read_bytes())  # noqa: S301 - our own pickle, to show that it would have run
    assert folder.exists()


def drop(weights: Weights, _: dict[str, Any]) -> None:
    del weights["norm.bias"]


def rename(weights: Weights, _: dict[str, Any]) -> None:
    weights["norm.offset"] = weights.pop("norm.bias")


def reshape(weights: Weights, _: dict[str, Any]) -> None:
    weights["norm.bias"] = torch.zeros(15)


def spoil(weights: Weights, _: dict[str, Any]) -> None:
    weights["blocks.1.attn.proj.weight"][3, 4] = torch.nan
    weights["head.bias"][0] = torch.inf


def retype(weights: Weights, _: dict[str, Any]) -> None:
    weights["norm.bias"] = torch.zeros(16, dtype=torch.int32)


def drop_all_blocks(weights: Weights, _: dict[str, Any]) -> None:
    for name in [name for name in weights if name.startswith("blocks.")]:
        del weights[name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, r"1 weight missing: norm\.bias$"),
        (rename, r"1 weight missing: norm\.bias; 1 weight unexpected: norm\.offset$"),
        (reshape, r"1 weight with the wrong shape: norm\.bias is \(15,\) instead of \(16,\)$"),
        (spoil, r"2 weights not finite: blocks\.1\.attn\.proj\.weight, head\.bias$"),
        (retype, r"1 weight with the wrong dtype: norm\.bias is torch\.int32 instead of torch\.float32$"),
        (drop_all_blocks, r"\d\d weights missing: blocks\.0\.norm1\.weight, .* and \d\d more$"),
    ],
)
def test_weights_that_do_not_match_the_model_are_listed_by_name(
    tiny_file: Path, change: Callable[[Weights, dict[str, Any]], None], reason: str
) -> None:
    rewrite(tiny_file, change)
    with pytest.raises(CheckpointMismatchError, match=rf"tiny\.safetensors: {reason}"):
        load_checkpoint(tiny_file)


def test_a_foreign_safetensors_file_is_checked_against_the_published_model(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"conv.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"15\d weights missing: .*; 1 weight unexpected: conv\.weight"):
        load_checkpoint(path)


PLAIN_VITS = {
    "timm": {"pos_embed": (1, 5, 8), "blocks.0.attn.qkv.weight": (24, 8), "head.bias": (3,)},
    "wrapped": {"module.pos_embed": (1, 5, 8), "module.blocks.0.norm1.bias": (8,)},
    "transformers": {
        "vit.embeddings.position_embeddings": (1, 5, 8),
        "vit.encoder.layer.0.attention.attention.query.weight": (8, 8),
    },
}


@pytest.mark.parametrize("layout", PLAIN_VITS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loading_a_plain_vit_suggests_supervit_convert(tmp_path: Path, layout: str, suffix: str) -> None:
    path = tmp_path / f"vit{suffix}"
    weights = {name: torch.zeros(shape) for name, shape in PLAIN_VITS[layout].items()}
    torch.save({"model": weights}, path) if suffix == ".pth" else safetensors.torch.save_file(weights, path)
    with pytest.raises(CheckpointMismatchError, match=rf"vit\{suffix}: is a plain ViT: run `supervit convert`"):
        load_checkpoint(path)
    assert len(read_weights(path)) == len(weights)


def test_a_shipped_checkpoint_loads_by_its_name() -> None:
    name = "supervit-micro-cifar10"
    path = SHIPPED_FOLDER / f"{name}.safetensors"
    assert load_checkpoint(name).version == load_checkpoint(path).version
    assert read_weights(Path(name)).keys() == read_weights(path).keys()


def test_weight_names_from_a_file_are_escaped_and_shortened_in_the_error(tiny_file: Path) -> None:
    def rename_wildly(weights: Weights, _: dict[str, Any]) -> None:
        weights["\x1b[2J\n" + "x" * 5000] = weights.pop("norm.bias")

    rewrite(tiny_file, rename_wildly)
    with pytest.raises(CheckpointMismatchError, match=r"1 weight unexpected: \\x1b\[2J\\nx+…x+$") as caught:
        load_checkpoint(tiny_file)
    assert len(str(caught.value)) < len(str(tiny_file)) + 200


def set_in_header(*keys: str, value: object) -> Callable[[Weights, dict[str, Any]], None]:
    def change(_: Weights, header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_in_header("class_names", value=["a", "b"]), "2 class names for 3 classes"),
        (set_in_header("class_names", value=7), "class_names"),
        (set_in_header("profile", "rows", value=[]), "a profile needs at least one row"),
        (set_in_header("config", "width", value=17), "not a multiple of 2 heads"),
        (set_in_header("config", "flavour", value="swin"), "flavour"),
        (set_in_header("config", "mlp_ratio", value=float("nan")), "mlp_ratio"),
        (
            set_in_header("config", "patch_grids", value=[2, 3, 4, 5]),
            "the profile has no row for grid 5 at keep rate 0.5",
        ),
        (set_in_header("config", "patch_grids", value=[3, 4]), "the profile has grid 2, which was not trained"),
        (set_in_header("config", value=None), "config"),
        (set_in_header("config", "crop_fraction", value=1e-7), "crop_fraction"),
        (set_in_header("config", "width", value=2 * 10**400), "a number is out of range$"),
        (
            set_in_header("config", "depth", value="\x1b[2J" + "x" * 5000),
            r"invalid value '\\x1b\[2Jx+…x+' for config\.depth$",
        ),
    ],
)
def test_an_invalid_or_contradictory_header_is_unreadable(
    tiny_file: Path, change: Callable[[Weights, dict[str, Any]], None], reason: str
) -> None:
    rewrite(tiny_file, change)
    with pytest.raises(UnreadableCheckpointError, match=f"invalid SuperViT header: .*{reason}") as caught:
        load_checkpoint(tiny_file)
    assert len(str(caught.value)) < len(str(tiny_file)) + 200


def set_in_first_row(name: str, value: float) -> Callable[[Weights, dict[str, Any]], None]:
    def change(_: Weights, header: dict[str, Any]) -> None:
        header["profile"]["rows"][0][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            set_in_first_row("is_trained", False),
            "invalid SuperViT header: .*a wrong is_trained for grid 2 at keep rate 0.5",
        ),
        (set_in_first_row("macs", -5), "invalid SuperViT header: .*MACs must be at least 1, not -5"),
        (set_in_first_row("macs", 5), "its header has wrong MACs for grid 2 at keep rate 0.5: 5$"),
        (set_in_first_row("top1", -0.1), "invalid SuperViT header: .*top1 must be in 0..1"),
        (set_in_first_row("top5", 7.0), "invalid SuperViT header: .*top5 must be in 0..1"),
    ],
)
def test_a_profile_with_wrong_values_is_unreadable(
    tiny_file: Path, change: Callable[[Weights, dict[str, Any]], None], reason: str
) -> None:
    rewrite(tiny_file, change)
    with pytest.raises(UnreadableCheckpointError, match=rf"tiny\.safetensors: {reason}"):
        load_checkpoint(tiny_file)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 5000, "not valid JSON"),
        ("\ud7ff" * 9, "not valid JSON"),
        ("[]", r"name is missing|invalid value \[\]"),
        ("null", "invalid value None"),
        ('{"name": "tiny"}', "config is missing"),
    ],
)
def test_a_header_that_is_not_json_or_lacks_fields_is_unreadable(tiny_file: Path, header: str, problem: str) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(tiny_file), tiny_file, metadata={HEADER_KEY: header})
    with pytest.raises(UnreadableCheckpointError, match=f"invalid SuperViT header: ({problem})$"):
        load_checkpoint(tiny_file)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("depth", 10**12, "too few for 1000000000000 blocks"),
        ("width", 10**13, "its weights would be too large"),
        ("mlp_ratio", 1e300, "its weights would be too large"),
        ("patch_kernel", 10**30, "its weights would be too large"),
    ],
)
def test_a_header_of_absurd_sizes_is_refused_without_hanging_or_filling_memory(
    tiny_file: Path, key: str, value: float, reason: str
) -> None:
    rewrite(tiny_file, set_in_header("config", key, value=value))
    with pytest.raises(CheckpointMismatchError, match=reason):
        load_checkpoint(tiny_file)


def damaged(data: bytes, seed: int) -> bytes:
    """Cut the data short, flip one bit, or overwrite up to five bytes, mostly near the start or the end."""
    choice = random.Random(seed)
    spots = (len(data), min(len(data), 2000), 200)
    position = choice.choice([1, -1]) * choice.randrange(choice.choice(spots))
    if seed % 4 == 0:
        return data[:position]
    changed = bytearray(data)
    if seed % 4 == 1:
        changed[position] ^= 1 << choice.randrange(8)
    else:
        for _ in range(choice.randint(1, 5)):
            changed[choice.randrange(choice.choice(spots))] = choice.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch's, about damaged files
@pytest.mark.filterwarnings("ignore:Defining your `__torch_function__`:UserWarning")  # torch's, about its own code
@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_either_loads_or_raises_a_checkpoint_error(
    tmp_path: Path, deit: SuperViT, tiny_config: SuperViTConfig, layout: str
) -> None:
    path = tmp_path / "damaged"
    if layout == "safetensors":
        header = Header("tiny", tiny_config, ("a", "b", "c"), ProfileTable.unmeasured(tiny_config))
        save_checkpoint(path, deit, header)
    else:
        content = {"model": dict(list(deit.state_dict().items())[:9]), "args": argparse.Namespace(epochs=3)}
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    data = path.read_bytes()
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(300):
        path.write_bytes(damaged(data, seed))
        try:
            load_checkpoint(path) if layout == "safetensors" else read_weights(path)
            outcomes["loaded"] += 1
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


def test_files_have_equal_versions_only_if_their_contents_are_equal(tiny_file: Path, tmp_path: Path) -> None:
    twin, other = tmp_path / "twin", tmp_path / "other"
    shutil.copy(tiny_file, twin)
    shutil.copy(tiny_file, other)
    rewrite(other, set_in_header("name", value="other"))
    versions = [load_checkpoint(path).version for path in (tiny_file, twin, other)]
    assert versions[0] == versions[1] != versions[2]
    assert all(len(version) == 12 for version in versions)


def test_a_header_must_profile_every_subnetwork(tiny_config: SuperViTConfig) -> None:
    rows = ProfileTable.unmeasured(tiny_config).rows
    without_one = ProfileTable(tuple(row for row in rows if row.subnetwork != SubNetwork(3, 0.7)))
    with pytest.raises(ValueError, match=r"the profile has no row for grid 3 at keep rate 0\.7"):
        Header("tiny", tiny_config, ("a", "b", "c"), without_one)


def test_round_to_half_gives_the_weights_of_a_half_precision_checkpoint(tmp_path: Path, model: SuperViT) -> None:
    header = Header("half", model.config, CLASS_NAMES, ProfileTable.unmeasured(model.config))
    save_checkpoint(tmp_path / "half.safetensors", model, header, half=True)
    round_to_half(model)
    loaded = load_checkpoint(tmp_path / "half.safetensors").model.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())
