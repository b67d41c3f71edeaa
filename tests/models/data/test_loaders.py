import itertools
import shutil
from pathlib import Path

import pytest
import torch

from models.data.datasets import NO_LABEL, ImageSet, TrainingSamples, open_folder
from models.data.images import evaluation_transform
from models.data.loaders import SampleLoader, gather_round_robin, interleave, load_round_robin
from models.errors import DataError
from models.processes import ALONE, Process
from models.subnetwork import SuperViTConfig


@pytest.fixture
def images(pictures: Path, tmp_path: Path, tiny_config: SuperViTConfig) -> ImageSet:
    """Twelve images, of which numbers 1 and 11 cannot be read."""
    shutil.copytree(pictures / "val", tmp_path / "val")
    for name in ("blue/1.png", "red/3.png"):
        (tmp_path / "val" / name).write_text("no picture")
    return open_folder(tmp_path / "val", evaluation_transform(tiny_config), max_bad_images=0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_over_all_workers_and_batches_stay_full(
    images: ImageSet, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = list(SampleLoader(images, 4, num_workers=workers))
    assert [labels.tolist() for _, labels in batches] == [[0, NO_LABEL, 0, 0], [1] * 4, [2, 2, 2, NO_LABEL]]
    assert "2 of 12 images" in capsys.readouterr().err
    samples = TrainingSamples(images, None)
    batches = list(SampleLoader(samples, 4, num_workers=workers))  # type: ignore[arg-type] # labels of either kind
    assert [labels.tolist() for _, labels in batches] == [[0] * 4, [1] * 4, [2, 2, 2, 0]]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_raise_a_one_line_error_with_and_without_workers(images: ImageSet, workers: int) -> None:
    images.max_bad_images = 0.1
    batches = iter(SampleLoader(images, 1, num_workers=workers))
    seen = [next(batches)[1].item() for _ in range(11)]
    assert seen == [0, NO_LABEL, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"{images.folder}/red/3.png: not a readable image: cannot identify image file")
    assert str(caught.value).endswith("more than --max-bad-images 0.1 allows")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_processes_load_in_turn_the_batches_that_one_process_would_load(images: ImageSet, processes: int) -> None:
    chosen = [0, 2, 3, 4, 6, 8, 9]
    alone = [labels.tolist() for _, labels in load_round_robin(images, chosen, 2, 0, ALONE)]
    assert alone == [[0, 0], [0, 1], [1, 2], [2]]
    loaders = [
        load_round_robin(images, chosen, 2, 0, Process(rank, processes, ALONE.device)) for rank in range(processes)
    ]
    dealt = itertools.zip_longest(*([labels.tolist() for _, labels in loader] for loader in loaders))
    assert [batch for turn in dealt for batch in turn if batch is not None] == alone


def test_results_of_round_robin_batches_are_joined_in_batch_order() -> None:
    shares = [[torch.tensor([[0], [1]]), torch.tensor([[4]])], [torch.tensor([[2], [3]])], []]
    assert interleave(shares).tolist() == [[0], [1], [2], [3], [4]]
    assert gather_round_robin(shares[0]).tolist() == [[0], [1], [4]]  # of a single process


def test_workers_are_kept_for_the_next_pass(images: ImageSet) -> None:
    loader = load_round_robin(images, range(12), 4, 1, ALONE)
    others = {child.pid for child in torch.multiprocessing.active_children()}  # of a loader not yet garbage-collected
    pids: set[int | None] = set()
    for _ in range(2):
        list(loader)
        pids |= {child.pid for child in torch.multiprocessing.active_children()} - others
    assert len(pids) == 1
    assert not load_round_robin(images, range(12), 4, 0, ALONE).persistent_workers
