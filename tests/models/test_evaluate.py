import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.data import DataError
from timm.data import ImageNetInfo
from torch import Tensor

from models.calibration import HIGHEST_EXPONENT, LOWEST_EXPONENT, Scaling, fit_scaling
from models.checkpoint import Checkpoint, load_checkpoint
from models.devices import DeviceError
from models.evaluate import (
    accuracy_table,
    calibration_summary,
    count_correct,
    evaluate,
    fit_scalings,
    label_indices,
    measure_accuracy,
)
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
    for chosen, top1, top1_pruned in ((batches, 2 / 4, 2 / 4), (batches[:1], 2 / 3, 2 / 3), (batches[1:], 0.0, 0.0)):
        measured = measure_accuracy(ByBrightness(tiny_config), iter(chosen), {whole: Scaling(), pruned: Scaling()})
        assert (measured[whole].top1, measured[whole].top5) == (top1, 1.0)
        assert (measured[pruned].top1, measured[pruned].top5) == (top1_pruned, 1.0)


def test_the_calibration_error_is_that_at_the_temperature(
    tiny_config: SuperViTConfig, batches: list[tuple[Tensor, Tensor]]
) -> None:
    whole = SubNetwork(4, 1.0)
    for temperature in (0.5, 1.0, 2.0):
        measured = measure_accuracy(ByBrightness(tiny_config), batches, {whole: Scaling(temperature)})
        # All four answers have one confidence, that of logits 1, 0 and -1, and two are right.
        weights = [math.exp(logit / temperature) for logit in (1, 0, -1)]
        assert measured[whole].calibration_error == pytest.approx(abs(weights[0] / sum(weights) - 2 / 4), rel=1e-5)


def test_scalings_are_fitted_for_each_subnetwork(
    tiny_config: SuperViTConfig, batches: list[tuple[Tensor, Tensor]]
) -> None:
    whole, pruned = SubNetwork(4, 1.0), SubNetwork(2, 0.5)
    images, labels = batches[0][0][[0, 1, 1, 1]], torch.tensor([0, 1, 1, 2])
    scalings = fit_scalings(ByBrightness(tiny_config), iter([(images, labels)]), [whole, pruned])
    for subnetwork, scaling in scalings.items():
        assert scaling == fit_scaling(ByBrightness(tiny_config)(images.float() - 100, subnetwork), labels)
    assert scalings[whole].temperature < scalings[pruned].temperature


def test_nothing_to_measure_on_is_an_error(tiny_config: SuperViTConfig) -> None:
    with pytest.raises(ValueError, match="no images"):
        measure_accuracy(SuperViT(tiny_config), [], dict.fromkeys(tiny_config.subnetworks, Scaling()))


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


def test_one_folder_serves_for_both(tiny_file: Path, pictures: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(DataError, match="data: holds neither val/ nor test/"):
        measure(checkpoint, data)
    (data / "test").symlink_to(pictures / "val", target_is_directory=True)
    assert measure(checkpoint, data) == measure(checkpoint, pictures)


def test_val_calibrates_and_test_is_measured_where_there_are_both(
    tiny_file: Path, pictures: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_file)
    checkpoint = replace(checkpoint, model=ByTint(checkpoint.config).eval(), class_names=("red", "green", "blue"))
    for split, red in (("val", "red"), ("test", "green")):  # in test/, all that is called red is green
        (tmp_path / split).mkdir()
        (tmp_path / split / "red").symlink_to(pictures / "val" / red, target_is_directory=True)
    table = measure(checkpoint, tmp_path)
    assert {row.top1 for row in table.rows} == {0.0}
    assert max(row.temperature for row in table.rows) < 1  # as val/ is never wrong
    assert all(LOWEST_EXPONENT <= row.entropy_exponent <= HIGHEST_EXPONENT for row in table.rows)
    assert min(row.calibration_error or 0 for row in table.rows) > 0.9


def test_a_few_thousand_images_from_all_over_are_enough_to_calibrate(
    tiny_file: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watch(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            seen.append(batch[1])
            yield batch

    monkeypatch.setattr("models.evaluate.CALIBRATION_IMAGES", 6)
    evaluate(load_checkpoint(tiny_file), pictures, batch_size=100, workers=0, progress=watch, device="cpu")
    assert [labels.tolist() for labels in seen] == [[0, 0, 1, 1, 2, 2], [0] * 4 + [1] * 4 + [2] * 4]


def test_keep_rates_between_are_measured_on_demand(tiny_file: Path, pictures: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    table = evaluate(
        checkpoint, pictures, batch_size=12, workers=0, progress=unwrapped, device="cpu", rates_between=True
    )
    assert table.by_subnetwork.keys() == checkpoint.profile.with_rates_between(checkpoint.config).by_subnetwork.keys()
    assert len(table.rows) > len(checkpoint.profile.rows)
    assert not any(row.is_interpolated for row in table.rows)
    assert {row.subnetwork for row in table.rows if row.is_trained} == set(checkpoint.config.subnetworks)
    by_name = measure(checkpoint, pictures).by_subnetwork
    assert all(table.by_subnetwork[subnetwork] == row for subnetwork, row in by_name.items())


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


def test_the_table_has_a_row_per_keep_rate_and_a_column_per_grid() -> None:
    rows = (
        SubNetworkProfile(SubNetwork(8, 0.5), 742_000_000, 0.7375),
        SubNetworkProfile(SubNetwork(8, 1.0), 1_438_000_000, 0.7579),
        SubNetworkProfile(SubNetwork(14, 1.0), 4_599_000_000),
    )
    assert accuracy_table(ProfileTable(rows)).splitlines() == [
        "keep rate              grid 8             grid 14",
        "      0.5     73.75 % 0.742 G                   -",
        "        1     75.79 % 1.438 G           ? 4.599 G",
    ]


def test_the_summary_tells_the_extremes() -> None:
    rows = (
        SubNetworkProfile(SubNetwork(8, 0.5), 1, 0.7, temperature=0.9, calibration_error=0.0123),
        SubNetworkProfile(SubNetwork(8, 1.0), 2, 0.8, temperature=1.25, calibration_error=0.007),
    )
    summary = "expected calibration error 0.70 to 1.23 % at temperatures of 0.900 to 1.250"
    assert calibration_summary(ProfileTable(rows)) == summary
