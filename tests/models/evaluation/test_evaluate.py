import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint
from models.data.datasets import NO_LABEL
from models.errors import DataError
from models.evaluation.calibration import HIGHEST_EXPONENT, LOWEST_EXPONENT, Scaling, fit_scaling
from models.evaluation.evaluate import Evaluation, evaluate, fit_scalings
from models.evaluation.hold_out import label_indices
from models.evaluation.judging import judge, judge_images, make_answer, measure_accuracy, summarise
from models.processes import ALONE
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT


def test_each_answer_is_judged_by_its_top1_its_top5_and_its_confidence() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 3 + [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    judged = judge(logits, torch.tensor([0, 2, 1, 5]), Scaling(2.0))  # the first rows rank the classes 0 5 4 3 2 1
    assert judged[:, 0].tolist() == [1, 0, 0, 1]
    assert judged[:, 1].tolist() == [1, 1, 0, 1]
    assert judged[:, 2].tolist() == pytest.approx((logits / 2).softmax(dim=1).max(dim=1).values.tolist())


def test_top5_is_always_right_with_fewer_than_five_classes() -> None:
    judged = judge(torch.tensor([[0.1, 0.9], [0.1, 0.9]]), torch.tensor([0, 1]), Scaling())
    assert judged[:, :2].tolist() == [[0, 1], [1, 1]]


class ByBrightness(SuperViT):
    """Answers class 0 for dark images and class 1 for bright ones; at keep rate 0.5 always class 0."""

    def forward(self, images: Tensor, subnetwork: SubNetwork | None = None) -> Tensor:
        assert subnetwork is not None
        bright = (images.mean(dim=(1, 2, 3)) > 0).float() * (subnetwork.keep_rate > 0.5)
        return torch.stack([1 - bright, bright, torch.full_like(bright, -1.0)], dim=1)


class ByTint(SuperViT):
    """Answers class 0, 1 or 2 for images that are mostly red, green or blue."""

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
        measured = measure_accuracy(
            make_answer(ByBrightness(tiny_config)), iter(chosen), {whole: Scaling(), pruned: Scaling()}
        )
        assert (measured[whole].top1, measured[whole].top5) == (top1, 1.0)
        assert (measured[pruned].top1, measured[pruned].top5) == (top1_pruned, 1.0)


def test_the_calibration_error_is_measured_at_the_given_temperature(
    tiny_config: SuperViTConfig, batches: list[tuple[Tensor, Tensor]]
) -> None:
    whole = SubNetwork(4, 1.0)
    for temperature in (0.5, 1.0, 2.0):
        measured = measure_accuracy(make_answer(ByBrightness(tiny_config)), batches, {whole: Scaling(temperature)})
        # All four answers have the same confidence, that of logits 1, 0 and -1, and two are right.
        weights = [math.exp(logit / temperature) for logit in (1, 0, -1)]
        assert measured[whole].calibration_error == pytest.approx(abs(weights[0] / sum(weights) - 2 / 4), rel=1e-5)


def test_scalings_are_fitted_for_each_subnetwork(
    tiny_config: SuperViTConfig, batches: list[tuple[Tensor, Tensor]]
) -> None:
    whole, pruned = SubNetwork(4, 1.0), SubNetwork(2, 0.5)
    images, labels = batches[0][0][[0, 1, 1, 1]], torch.tensor([0, 1, 1, 2])
    answer = make_answer(ByBrightness(tiny_config))
    scalings, confidences = fit_scalings(answer, iter([(images, labels)]), [whole, pruned])
    for subnetwork, scaling in scalings.items():
        logits = ByBrightness(tiny_config)(images.float() - 100, subnetwork)
        assert scaling == fit_scaling(logits, labels)
        assert torch.equal(confidences[subnetwork], scaling.probabilities(logits.double()).max(dim=1).values)
    assert scalings[whole].temperature < scalings[pruned].temperature


def test_measuring_accuracy_without_images_is_an_error(tiny_config: SuperViTConfig) -> None:
    with pytest.raises(ValueError, match="no images"):
        measure_accuracy(make_answer(SuperViT(tiny_config)), [], dict.fromkeys(tiny_config.subnetworks, Scaling()))


def test_class_folders_are_mapped_by_name_in_any_order() -> None:
    assert label_indices(Path("val"), ["red", "blue"], ("blue", "green", "red")) == [2, 0]


def test_imagenet_folders_are_mapped_by_their_wordnet_numbers_or_their_names() -> None:
    names = tuple(ImageNetInfo().label_descriptions())
    assert label_indices(Path("val"), ["n01440764", "n15075141", names[3]], names) == [0, 999, 3]


def test_wordnet_numbers_are_refused_for_classes_other_than_imagenets() -> None:
    differences = "4 missing: cyan, green, red and 1 more; 2 extra: n01440764, n01443537"
    with pytest.raises(
        DataError, match=rf"^val: its class folders differ from the checkpoint's classes: {differences}$"
    ):
        label_indices(Path("val"), ["blue", "n01440764", "n01443537"], ("blue", "cyan", "green", "red", "teal"))


def unwrapped(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    return loader


def find(checkpoint: Checkpoint, data: Path, *, workers: int = 0, max_bad_images: float = 0.0) -> Evaluation:
    return evaluate(
        checkpoint,
        data,
        batch_size=5,
        workers=workers,
        max_bad_images=max_bad_images,
        progress=unwrapped,
        process=ALONE,
    )


def measure(checkpoint: Checkpoint, data: Path) -> ProfileTable:
    return find(checkpoint, data).profile


def test_every_subnetwork_of_a_checkpoint_is_measured_on_val(tiny_file: Path, pictures: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    table = measure(checkpoint, pictures)
    assert table.is_measured
    assert table.by_subnetwork.keys() == set(checkpoint.config.subnetworks)
    assert all(row.top5 == 1.0 for row in table.rows)
    assert {round(12 * (row.top1 or 0), 6) % 1 for row in table.rows} == {0}
    assert [row.macs for row in table.rows] == [row.macs for row in checkpoint.profile.rows]


def test_labels_follow_the_class_order_of_the_checkpoint_rather_than_of_the_folders(
    tiny_file: Path, pictures: Path
) -> None:
    checkpoint = load_checkpoint(tiny_file)
    checkpoint = replace(checkpoint, model=ByTint(checkpoint.config).eval())
    for class_names, top1 in ((("red", "green", "blue"), 1.0), (("blue", "green", "red"), 1 / 3)):
        table = measure(replace(checkpoint, class_names=class_names), pictures)
        assert table.cheapest.top1 == pytest.approx(top1)


def test_a_test_folder_alone_is_used_like_a_val_folder_alone(tiny_file: Path, pictures: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(DataError, match="data: holds neither val/ nor test/"):
        measure(checkpoint, data)
    (data / "test").symlink_to(pictures / "val", target_is_directory=True)
    assert measure(checkpoint, data) == measure(checkpoint, pictures)


class ByMemory(ByTint):
    """Is right about the first six images that it sees and wrong about all others."""

    def __init__(self, config: SuperViTConfig) -> None:
        super().__init__(config)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor, subnetwork: SubNetwork | None = None) -> Tensor:
        logits = super().forward(images, subnetwork)
        if len(self.seen) < 6:
            self.seen += list(images)
        known = torch.tensor([any(torch.equal(image, one) for one in self.seen) for image in images])
        return torch.where(known[:, None], logits, -logits)


def test_with_one_folder_half_of_each_class_is_used_to_fit_and_the_rest_to_measure_the_error(
    tiny_file: Path, pictures: Path
) -> None:
    checkpoint = load_checkpoint(tiny_file)
    model, only = ByMemory(checkpoint.config).eval(), ProfileTable(checkpoint.profile.rows[:1])
    found = find(replace(checkpoint, model=model, class_names=("red", "green", "blue"), profile=only), pictures)
    (row,) = found.profile.rows
    assert row.top1 == 0.5  # of all images
    assert (row.calibration_error or 0) > 0.3  # of the other six images alone, which are all wrong
    assert row.temperature < 1  # fitted on the six images that are all right
    assert found.basis == (
        "scalings fitted on 6 images of val/, calibration error from the other 6, accuracy from all 12 of val/"
    )


def test_images_used_for_fitting_count_only_in_the_accuracy(
    tiny_config: SuperViTConfig, batches: list[tuple[Tensor, Tensor]]
) -> None:
    whole = SubNetwork(4, 1.0)
    judged = judge_images(make_answer(ByBrightness(tiny_config)), batches, {whole: Scaling()})[whole]
    for fitted_on, share_right in (([], 2 / 4), ([2, 3], 1.0), ([0, 1, 3], 0.0)):
        measured = summarise(judged, fitted_on)
        confidence = math.e / (math.e + 1 + 1 / math.e)
        assert measured.top1 == 2 / 4
        assert measured.calibration_error == pytest.approx(abs(confidence - share_right), rel=1e-5)


def test_a_folder_of_a_single_image_is_refused(tiny_file: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "red").mkdir(parents=True)
    shutil.copy(pictures / "val" / "red" / "0.png", tmp_path / "val" / "red")
    with pytest.raises(DataError, match=f"{tmp_path}/val: at least two images are needed"):
        measure(load_checkpoint(tiny_file), tmp_path)


def test_scalings_are_fitted_on_val_and_test_is_measured_if_both_exist(
    tiny_file: Path, pictures: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_file)
    checkpoint = replace(checkpoint, model=ByTint(checkpoint.config).eval(), class_names=("red", "green", "blue"))
    for split, red in (("val", "red"), ("test", "green")):  # in test/, the folder red holds green images
        (tmp_path / split).mkdir()
        (tmp_path / split / "red").symlink_to(pictures / "val" / red, target_is_directory=True)
    found = find(checkpoint, tmp_path)
    table = found.profile
    assert found.basis == (
        "scalings fitted on 4 images of val/, calibration error from the 4 of test/, accuracy from all 4 of test/"
    )
    assert {row.top1 for row in table.rows} == {0.0}
    assert max(row.temperature for row in table.rows) < 1  # as the model is never wrong on val/
    assert all(LOWEST_EXPONENT <= row.entropy_exponent <= HIGHEST_EXPONENT for row in table.rows)
    assert min(row.calibration_error or 0 for row in table.rows) > 0.9


def test_calibration_uses_a_limited_number_of_images_from_all_classes(
    tiny_file: Path, pictures: Path, tmp_path: Path
) -> None:
    seen: list[Tensor] = []

    def watch(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            seen.append(batch[1])
            yield batch

    (tmp_path / "val").symlink_to(pictures / "train", target_is_directory=True)
    (tmp_path / "test").symlink_to(pictures / "val", target_is_directory=True)
    evaluate(
        load_checkpoint(tiny_file),
        tmp_path,
        batch_size=100,
        workers=0,
        max_bad_images=0.0,
        progress=watch,
        process=ALONE,
        calibration_images=6,
    )
    assert [labels.tolist() for labels in seen] == [[0, 0, 1, 1, 2, 2], [0] * 4 + [1] * 4 + [2] * 4]


def test_keep_rates_between_the_trained_ones_are_measured_on_request(tiny_file: Path, pictures: Path) -> None:
    checkpoint = load_checkpoint(tiny_file)
    table = evaluate(
        checkpoint,
        pictures,
        batch_size=5,
        workers=0,
        max_bad_images=0.0,
        progress=unwrapped,
        process=ALONE,
        rates_between=True,
    ).profile
    assert (
        table.by_subnetwork.keys() == checkpoint.profile.with_interpolated_rates(checkpoint.config).by_subnetwork.keys()
    )
    assert len(table.rows) > len(checkpoint.profile.rows)
    assert not any(row.is_interpolated for row in table.rows)
    assert {row.subnetwork for row in table.rows if row.is_trained} == set(checkpoint.config.subnetworks)
    by_name = measure(checkpoint, pictures).by_subnetwork
    assert all(table.by_subnetwork[subnetwork] == row for subnetwork, row in by_name.items())


def test_folders_of_unknown_classes_are_refused(tiny_file: Path, pictures: Path) -> None:
    checkpoint = replace(load_checkpoint(tiny_file), class_names=("blue", "green", "yellow"))
    with pytest.raises(DataError, match=r"1 missing: yellow; 1 extra: red$"):
        measure(checkpoint, pictures)


def test_a_broken_image_read_by_a_worker_is_named_in_a_one_line_error(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "red").mkdir(parents=True)
    for name in ("0.png", "1.png"):
        (tmp_path / "val" / "red" / name).write_text("no picture")
    with pytest.raises(DataError) as caught:
        find(load_checkpoint(tiny_file), tmp_path, workers=1)
    assert str(caught.value).startswith(f"{tmp_path}/val/red/")
    assert "not a readable image: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def damaged(pictures: Path, tmp_path: Path) -> Path:
    """Twelve images to evaluate on, of which two cannot be read, and a file that is not an image."""
    shutil.copytree(pictures / "val", tmp_path / "damaged" / "val")
    for name in ("red/0.png", "blue/2.png", "blue/names.csv"):
        (tmp_path / "damaged" / "val" / name).write_text("no picture")
    return tmp_path / "damaged"


def test_bad_images_are_named_and_count_neither_as_right_nor_as_wrong(
    tiny_file: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(tiny_file)
    checkpoint = replace(checkpoint, model=ByTint(checkpoint.config).eval(), class_names=("red", "green", "blue"))
    found = find(checkpoint, damaged, max_bad_images=0.2)
    assert {row.top1 for row in found.profile.rows} == {1.0}
    assert "accuracy from all 10 of val/" in found.basis
    printed = capsys.readouterr().err
    assert f"2 of 12 images of {damaged}/val cannot be read: blue/2.png, red/0.png" in printed
    assert f"{damaged}/val: skipped files with unsupported extensions: 1 .csv" in printed


def test_scalings_are_fitted_without_images_that_have_no_label(
    tiny_config: SuperViTConfig, batches: list[tuple[Tensor, Tensor]]
) -> None:
    whole, (images, labels) = SubNetwork(4, 1.0), batches[0]
    blank = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with_blank = [(torch.cat([images, blank]), torch.cat([labels, torch.tensor([NO_LABEL])]))]
    answer = make_answer(ByBrightness(tiny_config))
    fitted = [fit_scalings(answer, given, [whole])[0] for given in (batches[:1], with_blank)]
    assert fitted[0] == fitted[1]


class Noting(ByTint):
    """Records the precisions in which it is run."""

    def __init__(self, config: SuperViTConfig) -> None:
        super().__init__(config)
        self.asked_in: set[torch.dtype] = set()

    def forward(self, images: Tensor, subnetwork: SubNetwork | None = None) -> Tensor:
        is_on = torch.is_autocast_enabled("cpu")
        self.asked_in.add(torch.get_autocast_dtype("cpu") if is_on else torch.float32)
        return super().forward(images, subnetwork).to(torch.get_autocast_dtype("cpu") if is_on else torch.float32)


def test_evaluation_runs_in_the_native_precision_of_the_device(
    tiny_file: Path, pictures: Path, fast_precision: torch.dtype
) -> None:
    checkpoint = load_checkpoint(tiny_file)
    model = Noting(checkpoint.config)
    table = measure(replace(checkpoint, model=model.eval(), class_names=("red", "green", "blue")), pictures)
    assert model.asked_in == {fast_precision}
    assert table.cheapest.top1 == 1.0


def test_two_processes_measure_the_same_as_one(
    tiny_file: Path, damaged: Path, tmp_path: Path, torchrun: Callable[..., None]
) -> None:
    found = find(load_checkpoint(tiny_file), damaged, max_bad_images=0.2)
    torchrun("evaluation/two_evaluations.py", tiny_file, damaged, tmp_path / "found.json")
    together = json.loads((tmp_path / "found.json").read_text())
    assert together["profiles"] == [repr(found.profile)] * 2
    assert together["basis"] == found.basis
    assert together["left"] == []  # a thread that needs the interpreter after its end aborts the process
    assert together["num_seen"] == [5 + 5 + 2, 1 + 5]  # batches of five: of the six images to fit on, and of all twelve
