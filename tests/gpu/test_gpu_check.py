"""The GPU check script, run without a GPU: checks that need a GPU are not run, and faulty engines fail their checks."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoint import Checkpoint, save_checkpoint
from models.errors import DeviceError
from models.flops import count_macs
from models.header import Header
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from models.supervit import SuperViT
from service.engines.torch_engine import FloatPrecision, TorchEngine
from service.machine.snapshot import GpuSnapshot
from tests.gpu.checks import (
    MIB,
    CheckFailedError,
    Setting,
    check_alternation,
    check_eager_speed,
    check_graph_speed,
    check_parity,
    check_training,
    compare_readings,
)
from tests.gpu.gpu_check import CHECKS, Check, main, run_checks
from tests.service.conftest import CONFIG
from tests.service.engines.fake_graphs import FakeGraphDevice

NAMES = tuple(map(str, range(CONFIG.num_classes)))


class Engine(TorchEngine):
    """An engine on the CPU with fake CUDA graphs."""

    def __init__(self, model: SuperViT, precision: FloatPrecision | None = None) -> None:
        del precision
        super().__init__(model, "cpu", 1, "float32", FakeGraphDevice(total_bytes=100_000))


@pytest.fixture
def setting() -> Setting:
    torch.manual_seed(0)
    profile = ProfileTable.unmeasured(CONFIG)
    checkpoint = Checkpoint("tiny", "0", SuperViT(CONFIG).eval(), CONFIG, NAMES, profile)
    return Setting(torch.device("cpu"), (checkpoint,), (1, 2), 1, Engine)


def test_checks_that_need_a_gpu_are_reported_as_not_run_without_one(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = setting.checkpoints
    path, output = tmp_path / "tiny.safetensors", tmp_path / "gpu.json"
    header = Header(checkpoint.name, checkpoint.config, checkpoint.class_names, checkpoint.profile)
    save_checkpoint(path, checkpoint.model, header)
    few = [name for name in CHECKS if name != "server"]
    options = ["--device", "cpu", "--checkpoints", str(path), "--batch-sizes", "1", "2", "--runs", "1"]
    assert main(["--output", str(output), *options, "--checks", *few]) == 0
    written = json.loads(output.read_text())
    assert written["device"]["device"] == "cpu"
    status = {name: outcome["status"] for name, outcome in written["checks"].items()}
    assert status == {name: "not run" if CHECKS[name].needs_gpu else "passed" for name in few}
    assert [name for name in few if not CHECKS[name].needs_gpu] == [
        "parity in float32",
        "speed of eager kernels",
        "training in bfloat16",
    ]
    printed = capsys.readouterr().out
    assert all(f"{name}: {status[name]}" in printed for name in few)


def test_a_check_that_fails_or_raises_does_not_stop_the_others(setting: Setting) -> None:
    def wrong(_: Setting) -> dict[str, object]:
        raise CheckFailedError("it is 2")

    def broken(_: Setting) -> dict[str, object]:
        raise ZeroDivisionError

    def impossible(_: Setting) -> dict[str, object]:
        raise DeviceError("it has no bfloat16")

    checks = {
        "wrong": Check(wrong, needs_gpu=False),
        "broken": Check(broken, needs_gpu=False),
        "impossible": Check(impossible, needs_gpu=False),
        "right": Check(lambda _: {"figure": 1}, needs_gpu=False),
    }
    outcomes = run_checks(checks, setting)
    assert [outcome["status"] for outcome in outcomes.values()] == ["failed", "failed", "not run", "passed"]
    assert outcomes["wrong"]["reason"] == "it is 2"
    assert "ZeroDivisionError" in outcomes["broken"]["reason"]
    assert outcomes["right"]["found"] == {"figure": 1}


def test_one_failed_check_gives_exit_status_1_and_all_outcomes_are_written(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    options = ["--output", str(output), "--device", "cpu", "--checkpoints", "supervit-micro-cifar10"]

    def fail(_: Setting) -> dict[str, object]:
        raise CheckFailedError("it is 2")

    right, wrong = Check(lambda _: {}, needs_gpu=False), Check(fail, needs_gpu=False)
    assert main(options, {"wrong": wrong, "right": right}) == 1
    written = json.loads(output.read_text())["checks"]
    assert {name: outcome["status"] for name, outcome in written.items()} == {"wrong": "failed", "right": "passed"}
    assert main([*options, "--checks", "right"], {"wrong": wrong, "right": right}) == 0


def test_the_server_check_starts_queries_and_stops_the_real_command(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    options = ["--output", str(output), "--device", "cpu", "--checkpoints", "supervit-micro-cifar10"]
    assert main([*options, "--checks", "server"]) == 0
    assert json.loads(output.read_text())["checks"]["server"]["found"]["engine"].startswith("torch")


def test_an_unknown_device_gives_exit_status_1_and_an_error_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "gpu.json"), "--device", "bogus"]) == 1
    assert capsys.readouterr().err.startswith("device 'bogus' cannot be used")


def test_a_correct_engine_passes_the_parity_check(setting: Setting) -> None:
    for precision in ("float32", "bfloat16"):
        for found in check_parity(setting, precision).values():
            assert found["difference"] < 1e-3
            assert found["agreement"] == 1


class Wrong(Engine):
    """An engine that runs another sub-network in place of (4, 1.0)."""

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        return super().run(images, SubNetwork(2, 0.5) if subnetwork == SubNetwork(4, 1.0) else subnetwork)


class Drifting(Engine):
    """An engine whose logits change from run to run."""

    times = 0

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.times += 1
        return super().run(images, subnetwork) + 1e-6 * self.times


class Recapturing(Engine):
    """An engine that captures another graph each time a captured batch size is prepared again."""

    def prepare(self, subnetwork: SubNetwork, batch_size: int) -> None:
        already = self.captured()
        super().prepare(subnetwork, batch_size)
        if already and self.captured() == already:
            super().prepare(subnetwork, batch_size + 100 + already.num_graphs)


class Eager(Engine):
    """An engine that captures no graphs."""

    def prepare(self, subnetwork: SubNetwork, batch_size: int) -> None: ...


def test_graphs_alternate_without_being_captured_again(setting: Setting) -> None:
    found = check_alternation(setting)["tiny"]
    assert found["num_graphs"] == 4 * len(CONFIG.subnetworks)
    assert found["largest_difference_to_eager"] < 1e-3


@pytest.mark.parametrize(
    ("engine", "check", "problem"),
    [
        (Wrong, partial(check_parity, precision="float32"), r"not the CPU's answers: .*grid 4 at keep rate 1'"),
        (Drifting, check_alternation, "differ by .* from one run to another"),
        (Recapturing, check_alternation, "became Captured"),
        (Eager, check_alternation, "16 graphs were to be captured"),
        (Eager, check_graph_speed, "8 graphs were to be captured"),
    ],
)
def test_a_faulty_engine_fails_its_check(
    setting: Setting, engine: type[Engine], check: Callable[[Setting], object], problem: str
) -> None:
    with pytest.raises(CheckFailedError, match=problem):
        check(replace(setting, make_engine=engine))


class Timed(Engine):
    """An engine that takes the longer of the times to launch and to run its kernels, on a clock that all share."""

    now, launching_s, per_mac_s = 0.0, 1.0, 1e-6

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        captured = self.captured()
        launching_s = 0.01 if captured and captured.num_graphs else self.launching_s
        running_s = self.per_mac_s * len(images) * count_macs(CONFIG, subnetwork)
        Timed.now += max(launching_s, running_s)
        return super().run(images, subnetwork)


def test_small_sub_networks_are_faster_only_with_graphs(setting: Setting) -> None:
    setting = replace(setting, make_engine=Timed, clock=lambda: Timed.now)
    smallest = str(SubNetwork(2, 0.5))
    for rows in check_eager_speed(setting)["tiny"].values():
        assert [row["of_largest"] for row in rows.values()] == pytest.approx([1] * len(rows))
    found = check_graph_speed(setting)["tiny"]
    assert found["graphs"][2][smallest]["of_largest"] < 0.5
    assert found["held_bytes"] == 10 * 2 * len(CONFIG.subnetworks)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"launching_s": 0.001}, "graphs are slower than eager kernels"),
        ({"per_mac_s": 0.0}, r"the fastest sub-network takes 1\.00 of the time of the largest"),
    ],
)
def test_graphs_without_a_speed_advantage_fail_the_check(
    setting: Setting, changes: dict[str, float], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(Timed, name, value)
    if "launching_s" in changes:
        monkeypatch.setattr(Timed, "per_mac_s", 1e-9)
    with pytest.raises(CheckFailedError, match=problem):
        check_graph_speed(replace(setting, make_engine=Timed, clock=lambda: Timed.now))


def gpu(utilization: float | None = 0.9, free_mib: int = 60_000) -> GpuSnapshot:
    return GpuSnapshot(
        0, "H200", utilization=utilization, memory_total_bytes=80_000 * MIB, memory_free_bytes=free_mib * MIB
    )


def test_readings_that_differ_from_nvidia_smi_or_show_no_load_fail_the_check() -> None:
    theirs = {"total_mib": 80_000, "free_mib": 60_010, "utilization": 1.0}
    assert compare_readings([gpu()], [theirs])["nvidia-smi"] == [theirs]
    for ours, problem in (
        ([], "other GPUs"),
        ([gpu(free_mib=50_000)], "free_mib differs"),
        ([gpu(utilization=0.1)], "utilization differs"),
        ([gpu(utilization=None)], "NVML does not say all"),
    ):
        with pytest.raises(CheckFailedError, match=problem):
            compare_readings(ours, [theirs])
    with pytest.raises(CheckFailedError, match="no load is seen"):
        compare_readings([gpu(utilization=0.0)], [theirs | {"utilization": 0.0}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_changes_the_weights(setting: Setting, dtype: torch.dtype) -> None:
    found = check_training(setting, dtype)
    assert found["steps_until_weights_changed"] == 1
    assert len(found["losses"]) == 4
