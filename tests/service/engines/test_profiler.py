import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from models.checkpoint import Checkpoint
from models.subnetwork import SubNetwork
from service.engines.base import Captured
from service.engines.profile_store import PROBES, load_or_measure, measure_latencies
from service.engines.profiler import MIN_RUNS, SLOW_S, Measurement, cells_of, measure, measurement_of
from service.engines.torch_engine import TorchEngine
from tests.service.engines.fake_graphs import FakeGraphDevice

SMALL, LARGE = SubNetwork(2, 0.5), SubNetwork(4, 1.0)
BATCH_SIZES = (1, 2, 4)

Cell = tuple[SubNetwork, int]


def seconds(subnetwork: SubNetwork, batch_size: int) -> float:
    """Return how long a batch takes by default: at most 40 ms."""
    return (0.002 if subnetwork == SMALL else 0.008) * (1 + batch_size)


class FakeEngine:
    """An engine that moves its own clock by the time of each batch, and records the batches."""

    def __init__(self, takes: Callable[[SubNetwork, int], float] = seconds) -> None:
        self.now = 100.0
        self.runs: list[Cell] = []
        self._takes = takes

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        assert images.shape[1:] == (3, 16, 16)
        assert images.dtype == torch.uint8
        self.runs.append((subnetwork, len(images)))
        self.now += self._takes(subnetwork, len(images))
        return torch.zeros(len(images), 7)

    def count(self, cell: Cell) -> int:
        return self.runs.count(cell)

    def measure(self, budget_s: float) -> Measurement:
        cells = cells_of((SMALL, LARGE), BATCH_SIZES)
        figures = measure(self.run, 16, cells, budget_s=budget_s, clock=lambda: self.now)
        return measurement_of(figures)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def load(tmp_path: Path, engine: FakeEngine) -> Callable[..., Measurement]:
    """load_or_measure with conditions that a test may change."""

    def load(**changes: object) -> Measurement:
        conditions: dict[str, object] = {
            "image_side": 16,
            "subnetworks": (SMALL, LARGE),
            "batch_sizes": BATCH_SIZES,
            "checkpoint_version": "0123456789ab",
            "engine": "fake 1.0 on a CPU, float32, 2 threads",
            "budget_s": 0,
            "clock": lambda: engine.now,
        }
        options: dict[str, Any] = conditions | changes
        return load_or_measure(tmp_path / "profiles", engine.run, **options)

    return load


def kept_file(folder: Path) -> Path:
    (path,) = (folder / "profiles").glob("latency-*.json*")
    return path


def test_every_sub_network_is_timed_at_every_batch_size(engine: FakeEngine) -> None:
    measurement = engine.measure(budget_s=0)
    assert measurement.table.batch_sizes == BATCH_SIZES
    assert set(measurement.table.seconds) == {SMALL, LARGE}
    for subnetwork, figures in measurement.table.seconds.items():
        assert figures == pytest.approx([seconds(subnetwork, size) for size in BATCH_SIZES])
        assert measurement.spread[subnetwork] == pytest.approx([0, 0, 0], abs=1e-9)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(measurement.measured_at)).total_seconds()) < 60


def test_the_first_run_of_a_batch_does_not_count() -> None:
    seen = set()

    def takes(subnetwork: SubNetwork, batch_size: int) -> float:
        is_first = (subnetwork, batch_size) not in seen
        seen.add((subnetwork, batch_size))
        return seconds(subnetwork, batch_size) + (0.05 if is_first else 0)

    measurement = FakeEngine(takes).measure(budget_s=0)
    assert measurement.table.seconds[SMALL] == pytest.approx([seconds(SMALL, size) for size in BATCH_SIZES])
    assert max(measurement.spread[SMALL]) < 1e-9


def test_prepare_comes_before_each_run_and_its_time_does_not_count(
    engine: FakeEngine, load: Callable[..., Measurement]
) -> None:
    prepared: list[Cell] = []

    def prepare(subnetwork: SubNetwork, batch_size: int) -> None:
        cell = subnetwork, batch_size
        assert engine.count(cell) == prepared.count(cell)
        prepared.append(cell)
        engine.now += 10 * SLOW_S

    table = load(prepare=prepare).table
    assert set(prepared) == {(subnetwork, size) for subnetwork in (SMALL, LARGE) for size in BATCH_SIZES}
    assert table.seconds[SMALL] == pytest.approx([seconds(SMALL, size) for size in BATCH_SIZES])


def test_a_measured_and_a_stored_table_say_whether_batches_are_padded(load: Callable[..., Measurement]) -> None:
    assert not load().table.is_padded
    assert load(is_padded=True).table.is_padded  # from the stored figures
    assert load(is_padded=True, fresh=True).table.is_padded


def test_a_disturbance_of_a_whole_round_does_not_change_the_medians(engine: FakeEngine) -> None:
    def takes(subnetwork: SubNetwork, batch_size: int) -> float:
        return seconds(subnetwork, batch_size) * (5 if 13 <= len(disturbed.runs) <= 18 else 1)  # the second round

    disturbed = FakeEngine(takes)
    measurement = disturbed.measure(budget_s=0)
    assert len(disturbed.runs) > 18
    for subnetwork, figures in engine.measure(budget_s=0).table.seconds.items():
        assert measurement.table.seconds[subnetwork] == pytest.approx(figures)


def test_the_spread_is_the_median_distance_from_the_median() -> None:
    figures = {1: iter([0.05, 0.010, 0.011, 0.013]), 2: iter([0.05, 0.02, 0.02, 0.02])}
    engine = FakeEngine(lambda _, batch_size: next(figures[batch_size]))
    cells = cells_of((SMALL,), (1, 2))
    measurement = measurement_of(measure(engine.run, 16, cells, budget_s=0, clock=lambda: engine.now))
    assert measurement.table.seconds[SMALL] == pytest.approx((0.011, 0.02))
    assert measurement.spread[SMALL] == pytest.approx((0.001 / 0.011, 0))


def test_each_batch_runs_three_times_after_a_first_run_even_without_a_time_budget(engine: FakeEngine) -> None:
    engine.measure(budget_s=0)
    assert {engine.count(cell) for cell in set(engine.runs)} == {MIN_RUNS + 1}


def test_rounds_continue_until_the_time_budget_is_spent(engine: FakeEngine) -> None:
    round_s = sum(seconds(subnetwork, size) for subnetwork in (SMALL, LARGE) for size in BATCH_SIZES)
    engine.measure(budget_s=10 * round_s)
    assert engine.now - 100 == pytest.approx(10 * round_s, abs=1.01 * round_s)


def test_every_round_runs_each_batch_once_in_a_different_order(engine: FakeEngine) -> None:
    engine.measure(budget_s=1)
    rounds = [engine.runs[start : start + 6] for start in range(0, len(engine.runs), 6)]
    assert all(len(set(cells)) == 6 for cells in rounds)
    assert len({tuple(cells) for cells in rounds}) > 2


def test_a_slow_batch_runs_twice_and_the_lower_figure_counts() -> None:
    def takes(subnetwork: SubNetwork, batch_size: int) -> float:
        if subnetwork == SMALL:
            return seconds(subnetwork, batch_size)
        return 2 * SLOW_S if slow.count((subnetwork, batch_size)) == 1 else 1.5 * SLOW_S

    slow = FakeEngine(takes)
    measurement = slow.measure(budget_s=0)
    assert [slow.count((LARGE, size)) for size in BATCH_SIZES] == [2, 2, 2]
    assert [slow.count((SMALL, size)) for size in BATCH_SIZES] == [MIN_RUNS + 1] * 3
    assert measurement.table.seconds[LARGE] == pytest.approx([1.5 * SLOW_S] * 3)


def test_measured_latencies_are_stored_for_the_next_start(engine: FakeEngine, load: Callable[..., Measurement]) -> None:
    first = load()
    runs = len(engine.runs)
    second = load()
    assert engine.runs[runs:] == [(LARGE, 1)] * PROBES
    assert second.measured_at == first.measured_at
    for subnetwork in (SMALL, LARGE):
        assert second.table.seconds[subnetwork] == pytest.approx(first.table.seconds[subnetwork])
        assert second.spread[subnetwork] == pytest.approx(first.spread[subnetwork], abs=1e-4)
    assert second.table.batch_sizes == BATCH_SIZES


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_version": "ba9876543210"},
        {"engine": "fake 1.1 on a CPU, float32, 2 threads"},
        {"subnetworks": (SMALL, SubNetwork(4, 0.9))},
        {"subnetworks": (SMALL, LARGE, SubNetwork(4, 0.9))},
        {"batch_sizes": (1, 2)},
        {"fresh": True},
    ],
)
def test_latencies_are_measured_anew_under_other_conditions(
    engine: FakeEngine, load: Callable[..., Measurement], change: dict[str, object]
) -> None:
    load()
    runs = len(engine.runs)
    load(**change)
    assert len(engine.runs) > runs


def test_latencies_are_measured_anew_with_another_number_of_cpus(
    engine: FakeEngine, load: Callable[..., Measurement]
) -> None:
    load()
    runs = len(engine.runs)
    load(cpus=512)
    assert len(engine.runs) > runs


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda _: "\udcff",
        lambda text: text.replace('"median_ms":', '"median_ms":-'),
        lambda text: text.replace('"keep_rate":0.5', '"keep_rate":1.5'),
        lambda text: text.replace('"batch_size":4', '"batch_size":5'),
        lambda text: text.replace("fake 1.0", "fake 2.0"),
        lambda text: text.replace('"format": 1', '"format": 0'),
    ],
)
def test_an_unusable_file_is_logged_in_one_line_and_its_latencies_are_measured_anew(
    engine: FakeEngine,
    load: Callable[..., Measurement],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[str], str],
) -> None:
    load()
    path = kept_file(tmp_path)
    sound = path.read_text()
    path.write_bytes(damage(sound).encode(errors="surrogateescape"))
    assert path.read_bytes() != sound.encode()
    runs = len(engine.runs)
    load()
    assert len(engine.runs) > runs
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(f"{path}: cannot be used, measuring again: ")
    assert "\n" not in record.getMessage()
    runs = len(engine.runs)
    load()
    assert len(engine.runs) == runs + PROBES  # the new file is sound


def test_what_is_missing_from_a_stored_profile_is_measured_and_its_rounds_are_tracked(
    engine: FakeEngine, load: Callable[..., Measurement], tmp_path: Path
) -> None:
    """A server completes it in idle moments; `supervit profile` needs all of it now."""
    rounds: list[int] = []

    def track(cells: Sequence[Cell]) -> Iterator[Cell]:
        rounds.append(len(cells))
        return iter(cells)

    whole = load(track=track)
    path = kept_file(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"rows": content["rows"][1:]}))
    completed = load(track=track)
    assert rounds == [6] * (MIN_RUNS + 1) + [1] * (MIN_RUNS + 1)
    assert completed.table.batch_sizes == BATCH_SIZES
    for subnetwork, figures in whole.table.seconds.items():
        assert completed.table.seconds[subnetwork] == pytest.approx(figures)
    assert completed.measured_at == whole.measured_at
    assert engine.count((SMALL, 1)) == 2 * (MIN_RUNS + 1)
    assert engine.count((SMALL, 2)) == MIN_RUNS + 1
    assert len(json.loads(path.read_text())["rows"]) == 6


@pytest.mark.parametrize(("factor", "is_kept"), [(0.05, False), (0.2, True), (5.0, True), (20.0, False)])
def test_latencies_that_the_machine_contradicts_are_measured_anew(
    engine: FakeEngine,
    load: Callable[..., Measurement],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    factor: float,
    is_kept: bool,
) -> None:
    load()
    path = kept_file(tmp_path)
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["median_ms"] *= factor
    path.write_text(json.dumps(content))
    runs = len(engine.runs)
    measured = load()
    assert (len(engine.runs) == runs + PROBES) is is_kept
    assert (measured.table.seconds[LARGE][0] == pytest.approx(seconds(LARGE, 1))) is not is_kept
    assert ("16 ms now" in caplog.text) is not is_kept


def test_latencies_are_measured_anew_if_a_larger_batch_takes_far_less_than_a_smaller_one(
    load: Callable[..., Measurement], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    path = kept_file(tmp_path)
    content = json.loads(path.read_text())
    content["rows"][1]["median_ms"] = content["rows"][0]["median_ms"] / 3.1
    path.write_text(json.dumps(content))
    assert load().table.seconds[SMALL] == pytest.approx([seconds(SMALL, size) for size in BATCH_SIZES])
    assert "less than a third of that of a smaller one" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "long"])
def test_a_link_pipe_folder_or_oversized_file_is_not_used_as_a_profile(
    load: Callable[..., Measurement], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    measured = load()
    path = kept_file(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    content = elsewhere.read_bytes()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(content.ljust(2**20 + 1))
    assert load().table == measured.table
    assert f"{path}: cannot be used, measuring again: " in caplog.text
    assert elsewhere.read_bytes() == content
    if kind != "folder":  # which a file cannot replace
        assert path.is_file()
        assert not path.is_symlink()


def test_the_log_warns_of_a_folder_that_other_users_can_write_to(
    load: Callable[..., Measurement], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    assert not caplog.records
    (tmp_path / "profiles").chmod(0o777)
    load()
    assert f"{tmp_path / 'profiles'}: other users can write there" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_tolerated_and_logged(
    load: Callable[..., Measurement], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profiles").write_text("a file where the folder should be")
    assert set(load().table.seconds) == {SMALL, LARGE}
    assert "failed to save the latencies: " in caplog.text


def test_a_start_waits_for_another_process_that_measures(
    load: Callable[..., Measurement], engine: FakeEngine, tmp_path: Path
) -> None:
    load()
    path, theirs, runs = kept_file(tmp_path), load(), len(engine.runs)
    path.rename(tmp_path / "not yet written")
    with ThreadPoolExecutor(1) as another, FileLock(path.with_suffix(".lock")):
        ours = another.submit(load)
        with pytest.raises(TimeoutError):
            ours.result(timeout=0.2)
        (tmp_path / "not yet written").rename(path)
    assert ours.result() == theirs
    assert engine.runs[runs:] == [(LARGE, 1)] * PROBES


def test_a_stopping_server_does_not_wait_for_another_process_that_measures(
    load: Callable[..., Measurement], tmp_path: Path
) -> None:
    load()
    stopping = threading.Event()
    with ThreadPoolExecutor(1) as another, FileLock(kept_file(tmp_path).with_suffix(".lock")):
        ours = another.submit(load, is_stopping=stopping.is_set)
        with pytest.raises(TimeoutError):
            ours.result(timeout=0.2)
        stopping.set()
        ours.result(timeout=10)


def test_the_file_is_readable_for_people(load: Callable[..., Measurement], tmp_path: Path) -> None:
    measurement = load()
    path = kept_file(tmp_path)  # and no half-written file beside it
    assert path.name.startswith("latency-0123456789ab-")
    text = path.read_text()
    content = json.loads(text)
    assert content["conditions"]["engine"] == "fake 1.0 on a CPU, float32, 2 threads"
    assert content["measured_at"] == measurement.measured_at
    assert len(content["rows"]) == 6
    row = content["rows"][-1]
    assert row == {
        "patch_grid": 4,
        "keep_rate": 1.0,
        "batch_size": 4,
        "median_ms": pytest.approx(1e3 * measurement.table.seconds[LARGE][2], abs=1e-4),
        "spread": pytest.approx(measurement.spread[LARGE][2], abs=1e-4),
    }
    assert sum('"patch_grid"' in line for line in text.splitlines()) == 6


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (3, (1, 2, 3)), (16, (1, 2, 4, 8, 16)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_latencies_are_measured_up_to_the_largest_batch_size(
    checkpoint: Checkpoint, tmp_path: Path, largest: int, sizes: tuple[int, ...]
) -> None:
    class Engine(TorchEngine):
        """An engine that answers at once."""

        def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
            del subnetwork
            ran.add(len(images))
            return images[:, :, 0, 0].float()

    ran: set[int] = set()
    engine = Engine(checkpoint.model, "cpu", 1, graph_device=FakeGraphDevice(total_bytes=100_000))
    kept = measure_latencies(checkpoint, engine, folder=tmp_path, max_batch_size=largest, budget_s=0.0)
    assert kept.table.batch_sizes == sizes
    assert ran == set(sizes)
    assert kept.table.is_padded
    count = len(kept.table.seconds) * len(sizes)
    assert engine.captured() == Captured(count, 10 * count)
