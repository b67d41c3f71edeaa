from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint
from models.data import DataError
from models.devices import DeviceError
from models.evaluate import accuracy_table, count_correct, evaluate, label_indices, measure_accuracy
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT


def test_the_best_and_the_best_five_are_counted() -> None:
    logits = torch.tensor(
        [
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],  # from best to worst: 0 5 4 3 2 1
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            [9.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        ]
    )
    assert count_correct(logits, torch.tensor([0, 2, 1, 5])) == (2, 3)
    assert count_correct(logits, torch.tensor([1, 1, 1, 0])) == (0, 0)


def test_fewer_than_five_classes_are_always_among_the_best_five() -> None:
    assert count_correct(torch.tensor([[0.1, 0.9], [0.1, 0.9]]), torch.tensor([0, 1])) == (1, 2)


class ByBrightness(SuperViT):
    """Answers class 0 for dark images and class 1 for bright ones; at keep rate 0.5 always class 0."""

    def forward(self, images: Tensor, subnetwork: SubNetwork | None = None) -> Tensor:
        assert subnetwork is not None
        bright = (images.mean(dim=(1, 2, 3)) > 0).float() * (subnetwork.keep_rate > 0.5)
        return torch.stack([1 - bright, bright, torch.full_like(bright, -1.0)], dim=1)


class ByTint(SuperViT):
    """Answers class 0, 1 or 2 for images that are red, green or blue above all."""

    def forward(self, images: Tensor, subnetwork: SubNetwork | None = None) -> Tensor:
        del subnetwork
        return images.mean(dim=(2, 3))


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    dark, bright = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    return [(torch.cat([dark, bright, bright]), torch.tensor([0, 1, 0])), (bright, torch.tensor([2]))]


def test_accuracy_is_counted_over_all_batches_for_each_subnetwork(
    tiny_config: SuperViTConfig, batches: list[tuple[Tensor, Tensor]]
) -> None:
    whole, pruned = SubNetwork(4, 1.0), SubNetwork(2, 0.5)
    measured = measure_accuracy(ByBrightness(tiny_config), iter(batches), [whole, pruned])
    assert measured == {whole: (2 / 4, 1.0), pruned: (2 / 4, 1.0)}
    measured = measure_accuracy(ByBrightness(tiny_config), batches[:1], [whole, pruned])
    assert measured == {whole: (2 / 3, 1.0), pruned: (2 / 3, 1.0)}
    measured = measure_accuracy(ByBrightness(tiny_config), batches[1:], [whole, pruned])
    assert measured == {whole: (0.0, 1.0), pruned: (0.0, 1.0)}


def test_nothing_to_measure_on_is_an_error(tiny_config: SuperViTConfig) -> None:
    with pytest.raises(ValueError, match="no images"):
        measure_accuracy(SuperViT(tiny_config), [], tiny_config.subnetworks)


def test_class_folders_are_mapped_by_name_in_any_order() -> None:
    assert label_indices(Path("val"), ["red", "blue"], ("blue", "green", "red")) == [2, 0]


def test_imagenet_folders_are_mapped_by_their_wordnet_numbers_or_their_names() -> None:
    names = tuple(ImageNetInfo().label_descriptions())
    assert label_indices(Path("val"), ["n01440764", "n15075141", names[3]], names) == [0, 999, 3]


def test_wordnet_numbers_mean_nothing_to_other_classes() -> None:
    with pytest.raises(DataError, match=r"val: class folder 'n01440764' is no class of the checkpoint \(2 such\)"):
        label_indices(Path("val"), ["blue", "n01440764", "n01443537"], ("blue", "green", "red"))


def unwrapped(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    return loader


def measure(checkpoint: Checkpoint, data: Path, *, workers: int = 0, device: str = "cpu") -> ProfileTable:
    return evaluate(checkpoint, data, batch_size=5, workers=workers, device=device, progress=unwrapped)


def test_every_subnetwork_of_a_checkpoint_is_measured_on_val(tiny_file: Path, pictures: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    table = measure(checkpoint, pictures)
    assert table.is_measured
    assert table.by_subnetwork.keys() == set(checkpoint.config.subnetworks)
    assert all(row.top5 == 1.0 for row in table.rows)
    assert {round(12 * (row.top1 or 0), 6) % 1 for row in table.rows} == {0}
    assert [row.macs for row in table.rows] == [row.macs for row in checkpoint.profile.rows]


def test_labels_follow_the_checkpoints_classes_rather_than_the_folders(tiny_file: Path, pictures: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    checkpoint = replace(checkpoint, model=ByTint(checkpoint.config).eval())
    for class_names, top1 in ((("red", "green", "blue"), 1.0), (("blue", "green", "red"), 1 / 3)):
        table = measure(replace(checkpoint, class_names=class_names), pictures)
        assert table.cheapest.top1 == pytest.approx(top1)


def test_test_is_measured_where_there_is_no_val(tiny_file: Path, pictures: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(DataError, match="data: holds neither val/ nor test/"):
        measure(checkpoint, data)
    (data / "test").symlink_to(pictures / "val", target_is_directory=True)
    assert measure(checkpoint, data) == measure(checkpoint, pictures)


def test_folders_of_unknown_classes_are_refused(tiny_file: Path, pictures: Path) -> None:
    checkpoint = replace(load_checkpoint(tiny_file), class_names=("blue", "green", "yellow"))
    with pytest.raises(DataError, match="class folder 'red' is no class"):
        measure(checkpoint, pictures)


def test_a_broken_image_is_named_in_one_line_with_workers_too(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "red").mkdir(parents=True)
    (tmp_path / "val" / "red" / "0.png").write_text("no picture")
    with pytest.raises(DataError) as caught:
        measure(load_checkpoint(tiny_file), tmp_path, workers=1)
    assert str(caught.value).startswith(f"{tmp_path}/val/red/0.png: not a readable image: ")
    assert "\n" not in str(caught.value)


def test_a_device_that_cannot_be_used_is_refused(tiny_file: Path, pictures: Path) -> None:
    with pytest.raises(DeviceError, match="device 'tpu9' cannot be used"):
        measure(load_checkpoint(tiny_file), pictures, device="tpu9")


def test_the_table_has_a_row_per_grid_and_a_column_per_keep_rate() -> None:
    rows = (
        SubNetworkProfile(SubNetwork(8, 0.5), 742_000_000, 0.7375),
        SubNetworkProfile(SubNetwork(8, 1.0), 1_438_000_000, 0.7579),
        SubNetworkProfile(SubNetwork(14, 1.0), 4_599_000_000),
    )
    assert accuracy_table(ProfileTable(rows)).splitlines() == [
        "grid            keep 0.5              keep 1",
        "   8     73.75 % 0.742 G     75.79 % 1.438 G",
        "  14                   -           ? 4.599 G",
    ]
