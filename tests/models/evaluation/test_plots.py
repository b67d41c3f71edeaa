from pathlib import Path

from PIL import Image

from models.evaluation.plots import plot_bench, plot_frontier, plot_latency, plot_training
from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and len(image.convert("RGB").getcolors(1_000_000) or ()) > 10


def test_plot_frontier_writes_a_png(tmp_path: Path) -> None:
    rows = [
        SubNetworkProfile(SubNetwork(grid, rate), int(1e6 * grid**2 * rate), 0.5 + grid / 100 + rate / 100)
        for grid in (8, 10)
        for rate in (0.5, 1.0)
    ]
    plot_frontier(ProfileTable(tuple(rows)), "tiny", tmp_path / "frontier.png")
    assert is_png(tmp_path / "frontier.png")


def test_plot_bench_writes_a_png_with_and_without_answered_requests(tmp_path: Path) -> None:
    answered = [(0.1 * number, 0.05 + 0.001 * number, number < 80) for number in range(100)]
    none_answered = [(0.0, None, False)]
    plot_bench({"10/s": answered, "20/s": none_answered}, tmp_path / "course.png")
    assert is_png(tmp_path / "course.png")
    plot_bench({"20/s": none_answered}, tmp_path / "none.png")
    assert is_png(tmp_path / "none.png")


def test_plot_training_writes_a_png_for_one_epoch_and_for_several(tmp_path: Path) -> None:
    records = [
        {"epoch": epoch, "loss": {"largest grid": 2.0 / epoch}, "top1": {"grid 8 at keep rate 1": epoch / 10}}
        for epoch in (1, 2, 3)
    ]
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        plot_training(records[:count], path)
        assert is_png(path)


def test_plot_training_writes_a_png_for_epochs_that_measured_different_subnetworks(tmp_path: Path) -> None:
    records = [
        {
            "epoch": 1,
            "loss": {"single grid": 2.0},
            "top1": {"grid 5 at keep rate 1": 0.5, "grid 8 at keep rate 1": 0.6},
        },
        {
            "epoch": 2,
            "loss": {"single grid": 1.0},
            "top1": {"grid 8 at keep rate 0.5": 0.6, "grid 8 at keep rate 1": 0.7},
        },
    ]
    plot_training(records, tmp_path / "both.png")
    assert is_png(tmp_path / "both.png")


def test_plot_latency_writes_a_png_for_many_subnetworks_and_for_one(tmp_path: Path) -> None:
    many = {
        SubNetwork(grid, rate): tuple(grid * rate * (4 + size) / 1e3 for size in (1, 2, 4, 8))
        for grid in (5, 6, 8)
        for rate in (0.5, 0.7, 1.0)
    }
    for name, table in (
        ("many", LatencyTable((1, 2, 4, 8), many)),
        ("one", LatencyTable((1,), {SubNetwork(5, 1): (1,)})),
    ):
        path = tmp_path / f"{name}.png"
        plot_latency(table, path)
        assert is_png(path)
