import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from service.machine.monitor import Monitor
from service.machine.snapshot import GpuSnapshot

GIB = 1 << 30
V1_NO_LIMIT = 9223372036854771712


class Machine:
    """A machine with its files below a folder: two idle CPUs, 16 GiB, no cgroups, and a clock that tests move."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 1000.0
        self.own_cpu_s = 3.0
        self.cpus = {0, 1}
        self.memory = (16 * GIB, 12 * GIB)
        self.write("proc/self/cgroup", "0::/")
        self.write_cpu_ticks({0: (500, 500), 1: (100, 900)})
        self.write_pressure("proc/pressure/cpu", 0)
        self.write_pressure("proc/pressure/memory", 0)

    def write(self, path: str, content: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{content}\n")

    def write_cpu_ticks(self, ticks: dict[int, tuple[int, int]]) -> None:
        lines = [f"cpu{cpu} {at_work} 0 0 {idle} 0 0 0 0 0 0" for cpu, (at_work, idle) in ticks.items()]
        self.write("proc/stat", "\n".join(["cpu  7 7 7 7 7 7 7 7 7 7", *lines, "intr 12345 0 0", "ctxt 7"]))

    def write_pressure(self, path: str, some_us: int) -> None:
        self.write(path, f"some avg10=9.00 avg60=9.00 avg300=9.00 total={some_us}\nfull avg10=9.00 avg60=9.00 total=99")

    def write_v1(self, folder: str, *, quota_us: int = -1, periods: int = 0, throttled: int = 0) -> None:
        self.write(f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us", quota_us)
        self.write(f"sys/fs/cgroup/{folder}/cpu.cfs_period_us", 100_000)
        stat = f"nr_periods {periods}\nnr_throttled {throttled}\nthrottled_time 123456789"
        self.write(f"sys/fs/cgroup/{folder}/cpu.stat", stat)

    def write_v2(self, folder: str, *, quota: str = "max", periods: int = 0, throttled: int = 0) -> None:
        self.write(f"sys/fs/cgroup/{folder}/cpu.max", f"{quota} 100000")
        stat = f"usage_usec 7\nnr_periods {periods}\nnr_throttled {throttled}\nthrottled_usec 123456"
        self.write(f"sys/fs/cgroup/{folder}/cpu.stat", stat)

    def write_v2_memory(self, folder: str, limit: int | str, usage: int, inactive_file: int = 0) -> None:
        self.write(f"sys/fs/cgroup/{folder}/memory.max", limit)
        self.write(f"sys/fs/cgroup/{folder}/memory.current", usage)
        self.write(f"sys/fs/cgroup/{folder}/memory.stat", f"anon 5\ninactive_file {inactive_file}\nactive_file 5")

    def monitor(self, nvml: ModuleType | None = None, /, **instead: Callable[..., object]) -> Monitor:
        sensors: dict[str, Callable[..., object]] = {
            "process_time": lambda: self.own_cpu_s,
            "cpus": lambda: self.cpus,
            "memory_bytes": lambda: self.memory,
            "rss_bytes": lambda: 300,
        }
        return Monitor(root=self.root, nvml=nvml, clock=lambda: self.now, **(sensors | instead))  # type: ignore[arg-type] # of several types


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def every_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_the_first_sample_is_taken_at_once_and_has_no_values_over_an_interval(machine: Machine) -> None:
    first = machine.monitor().latest
    assert (first.taken_at, first.cores, first.cpus) == (1000.0, 2, 2)
    assert (first.memory_total_bytes, first.memory_available_bytes) == (16 * GIB, 12 * GIB)
    assert first.process_rss_bytes == 300
    assert first.cpu_utilization is first.own_cpu_utilization is first.others_cores is None
    assert first.cpu_pressure is first.memory_pressure is first.cgroup_throttled_fraction is None
    assert first.gpus == ()


def test_cpu_time_is_split_between_this_process_and_others(machine: Machine) -> None:
    monitor = machine.monitor()
    machine.now += 0.25
    machine.own_cpu_s += 0.2
    machine.write_cpu_ticks({0: (525, 500), 1: (110, 915)})
    sample = monitor.sample()
    assert sample.cpu_utilization == pytest.approx(35 / 50)
    assert sample.own_cpu_utilization == pytest.approx(0.2 / (0.25 * 2))
    assert sample.others_cores == pytest.approx(2 * 35 / 50 - 0.2 / 0.25)
    assert monitor.latest is sample


def test_iowait_counts_as_idle_and_steal_as_busy(machine: Machine) -> None:
    machine.cpus = {0}
    machine.write("proc/stat", "cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\nintr 0")
    monitor = machine.monitor()
    machine.now += 1
    # user 1, nice 2, system 3, idle 40, iowait 30, irq 4, softirq 5, steal 15; guest 1, which is part of user
    machine.write("proc/stat", "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 3 40 30 4 5 15 1 0\nintr 0")
    assert monitor.sample().cpu_utilization == pytest.approx(30 / 100)


def test_cpus_outside_our_affinity_do_not_count(machine: Machine) -> None:
    machine.cpus = {1}
    monitor = machine.monitor()
    machine.now += 1
    machine.write_cpu_ticks({0: (600, 500), 1: (110, 990)})
    sample = monitor.sample()
    assert (sample.cores, sample.cpus) == (1, 1)
    assert sample.cpu_utilization == pytest.approx(0.1)
    assert sample.others_cores == pytest.approx(0.1)


def test_cpus_that_a_container_renumbers_give_none_and_one_log_line(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cpus = {4, 5}
    monitor = machine.monitor()
    machine.now += 1
    machine.write_cpu_ticks({0: (600, 500), 1: (110, 990)})
    sample = monitor.sample()
    assert sample.cpu_utilization is sample.others_cores is None
    assert sample.cpus == 2
    assert log_lines(caplog) == ["continuing without CPU times: KeyError: 4"]


def test_a_cpu_added_to_our_affinity_counts_from_its_first_full_interval_on(machine: Machine) -> None:
    machine.cpus = {0}
    monitor = machine.monitor()
    machine.now += 1
    machine.cpus = {0, 1}
    machine.write_cpu_ticks({0: (525, 575), 1: (200, 900)})
    assert monitor.sample().cpu_utilization == pytest.approx(0.25)
    machine.now += 1
    machine.write_cpu_ticks({0: (550, 650), 1: (300, 900)})
    assert monitor.sample().cpu_utilization == pytest.approx(125 / 200)


def test_the_cores_used_by_others_are_never_negative_despite_coarse_ticks(machine: Machine) -> None:
    monitor = machine.monitor()
    machine.now += 0.25
    machine.own_cpu_s += 0.25
    machine.write_cpu_ticks({0: (524, 501), 1: (100, 925)})
    assert monitor.sample().others_cores == 0


def test_two_samples_at_the_same_instant_give_none_instead_of_dividing_by_zero(machine: Machine) -> None:
    monitor = machine.monitor()
    machine.own_cpu_s += 0.1
    sample = monitor.sample()
    assert sample.cpu_utilization is sample.own_cpu_utilization is sample.others_cores is sample.cpu_pressure is None


def test_counters_that_decrease_give_none_for_one_interval(machine: Machine) -> None:
    machine.write_v1("cpu", quota_us=100_000, periods=100, throttled=50)
    machine.write("proc/self/cgroup", "1:cpu:/")
    machine.write_pressure("proc/pressure/cpu", 500_000)
    monitor = machine.monitor()
    machine.now += 1
    machine.own_cpu_s = 0
    machine.write_pressure("proc/pressure/cpu", 0)
    machine.write_cpu_ticks({0: (0, 0), 1: (0, 0)})
    machine.write_v1("cpu", quota_us=100_000)
    sample = monitor.sample()
    assert sample.cpu_utilization is sample.own_cpu_utilization is sample.others_cores is None
    assert sample.cpu_pressure is sample.cgroup_throttled_fraction is None
    machine.now += 1
    machine.own_cpu_s += 1
    machine.write_pressure("proc/pressure/cpu", 250_000)
    sample = monitor.sample()
    assert sample.own_cpu_utilization == 1
    assert sample.cpu_pressure == pytest.approx(0.25)


def test_a_counter_that_steps_back_does_not_affect_those_of_other_cpus(machine: Machine) -> None:
    monitor = machine.monitor()
    machine.now += 1
    machine.write_cpu_ticks({0: (550, 550), 1: (150, 890)})
    assert monitor.sample().cpu_utilization == pytest.approx(100 / 150)
    machine.now += 1
    machine.write_cpu_ticks({0: (600, 600), 1: (140, 990)})
    assert monitor.sample().cpu_utilization == pytest.approx(50 / 200)


def test_utilization_and_pressure_never_exceed_one(machine: Machine) -> None:
    monitor = machine.monitor()
    machine.now += 1
    machine.own_cpu_s += 2.1
    machine.write_pressure("proc/pressure/cpu", 1_000_100)
    sample = monitor.sample()
    assert sample.own_cpu_utilization == sample.cpu_pressure == 1


def test_pressure_is_computed_from_the_total_of_some_rather_than_an_average(machine: Machine) -> None:
    monitor = machine.monitor()
    machine.now += 0.25
    machine.write_pressure("proc/pressure/cpu", 100_000)
    machine.write_pressure("proc/pressure/memory", 25_000)
    sample = monitor.sample()
    assert sample.cpu_pressure == pytest.approx(0.4)
    assert sample.memory_pressure == pytest.approx(0.1)


def test_the_pressure_of_our_cgroup_takes_precedence_over_that_of_the_machine(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/pod")
    machine.write_pressure("sys/fs/cgroup/pod/cpu.pressure", 0)
    monitor = machine.monitor()
    machine.now += 1
    machine.write_pressure("proc/pressure/cpu", 900_000)
    machine.write_pressure("proc/pressure/memory", 300_000)
    machine.write_pressure("sys/fs/cgroup/pod/cpu.pressure", 200_000)
    sample = monitor.sample()
    assert sample.cpu_pressure == pytest.approx(0.2)
    assert sample.memory_pressure == pytest.approx(0.3)


def test_a_cgroup_v2_quota_limits_the_cores_and_reports_throttling(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/pod")
    machine.write_v2("pod", quota="150000", periods=10, throttled=4)
    monitor = machine.monitor()
    assert (monitor.latest.cores, monitor.latest.cpus, monitor.latest.cgroup_quota_cores) == (1.5, 2, 1.5)
    machine.now += 1
    machine.own_cpu_s += 0.75
    machine.write_v2("pod", quota="150000", periods=20, throttled=7)
    sample = monitor.sample()
    assert sample.cgroup_throttled_fraction == pytest.approx(0.3)
    assert sample.own_cpu_utilization == pytest.approx(0.5)


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_a_cgroup_v1_quota_limits_the_cores_and_reports_throttling(machine: Machine, mount: str) -> None:
    machine.write("proc/self/cgroup", "3:cpuset:/other\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/other")
    machine.write_v1(f"{mount}/other", quota_us=10_000)
    machine.write_v1(f"{mount}/docker/abc", quota_us=50_000, periods=10, throttled=4)
    monitor = machine.monitor()
    assert (monitor.latest.cores, monitor.latest.cgroup_quota_cores) == (0.5, 0.5)
    machine.now += 1
    machine.write_v1(f"{mount}/docker/abc", quota_us=50_000, periods=20, throttled=14)
    assert monitor.sample().cgroup_throttled_fraction == 1


def test_the_throttled_fraction_is_zero_if_no_period_ended_in_the_interval(machine: Machine) -> None:
    machine.write_v2("", quota="100000", periods=10, throttled=4)
    monitor = machine.monitor()
    machine.now += 0.01
    assert monitor.sample().cgroup_throttled_fraction == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_quota_and_the_throttled_fraction_are_none_without_a_quota(machine: Machine, version: str) -> None:
    if version == "v1":
        machine.write("proc/self/cgroup", "1:cpu:/")
        machine.write_v1("cpu", quota_us=-1)
    else:
        machine.write_v2("", quota="max")
    monitor = machine.monitor()
    machine.now += 1
    sample = monitor.sample()
    assert sample.cgroup_quota_cores is sample.cgroup_throttled_fraction is None
    assert sample.cores == 2


def test_a_quota_above_the_number_of_cpus_adds_no_cores(machine: Machine) -> None:
    machine.write_v2("", quota="800000")
    assert (machine.monitor().latest.cores, machine.monitor().latest.cgroup_quota_cores) == (2, 8)


def test_a_changed_quota_applies_from_the_next_sample_on(machine: Machine) -> None:
    machine.write_v2("", quota="max", periods=10, throttled=9)
    monitor = machine.monitor()
    for quota, cores, fraction in (("50000", 0.5, None), ("100000", 1, 0), ("max", 2, None)):
        machine.now += 1
        machine.write_v2("", quota=quota, periods=10, throttled=9)
        sample = monitor.sample()
        assert (sample.cores, sample.cgroup_throttled_fraction) == (cores, fraction)


def test_the_tightest_quota_applies_and_the_most_throttled_cgroup_with_a_quota_is_reported(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/slice/pod/app")
    machine.write_v2("slice", quota="150000")
    machine.write_v2("slice/pod", quota="50000")
    machine.write_v2("slice/pod/app", quota="max")
    monitor = machine.monitor()
    assert monitor.latest.cgroup_quota_cores == 0.5
    machine.now += 1
    machine.write_v2("slice", quota="150000", periods=10, throttled=1)
    machine.write_v2("slice/pod", quota="50000", periods=10, throttled=6)
    machine.write_v2("slice/pod/app", quota="max", periods=10, throttled=9)
    assert monitor.sample().cgroup_throttled_fraction == pytest.approx(0.6)


def test_a_hybrid_machine_uses_cgroup_v1_limits_and_v2_pressure(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/job\n1:cpu:/job\n0::/job")
    machine.write_v1("cpu/job", quota_us=50_000)
    machine.write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", 4 * GIB)
    machine.write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", 3 * GIB)
    machine.write("sys/fs/cgroup/memory/job/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB}")
    machine.write_pressure("sys/fs/cgroup/unified/job/cpu.pressure", 0)
    monitor = machine.monitor()
    machine.now += 1
    machine.write_pressure("sys/fs/cgroup/unified/job/cpu.pressure", 500_000)
    sample = monitor.sample()
    assert sample.cgroup_quota_cores == 0.5
    assert sample.cpu_pressure == pytest.approx(0.5)
    assert (sample.memory_total_bytes, sample.memory_available_bytes) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize("path", ["/", "/docker/of/the/host", "/../../elsewhere", "/.."])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_limits_in_a_container_are_read_at_the_root_of_the_mount(machine: Machine, version: str, path: str) -> None:
    for folder in ("..", "../..", "../elsewhere", "../../elsewhere"):
        machine.write_v1(folder, quota_us=1000)
        machine.write_v2(folder, quota="1000")
    if version == "v1":
        machine.write("proc/self/cgroup", f"1:cpu:{path}")
        machine.write_v1("cpu", quota_us=50_000)
    else:
        machine.write("proc/self/cgroup", f"0::{path}")
        machine.write_v2("", quota="50000")
    assert machine.monitor().latest.cgroup_quota_cores == 0.5


@pytest.mark.parametrize(
    ("machine_available", "usage", "idle_cache", "available"),
    [(12 * GIB, 7 * GIB, 2 * GIB, 3 * GIB), (GIB, 7 * GIB, 2 * GIB, GIB), (12 * GIB, 9 * GIB, 0, 0)],
    ids=["idle cache is as good as free", "the machine has less left", "above the limit"],
)
def test_available_memory_is_bounded_by_the_cgroup_and_by_the_machine(
    machine: Machine, machine_available: int, usage: int, idle_cache: int, available: int
) -> None:
    machine.memory = (16 * GIB, machine_available)
    machine.write_v2_memory("", 8 * GIB, usage, idle_cache)
    sample = machine.monitor().latest
    assert (sample.memory_total_bytes, sample.memory_available_bytes) == (8 * GIB, available)


def test_available_memory_is_bounded_by_the_cgroups_above_our_own(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/slice/app")
    machine.write_v2_memory("slice", 8 * GIB, usage=7 * GIB)
    machine.write_v2_memory("slice/app", 4 * GIB, usage=GIB)
    sample = machine.monitor().latest
    assert (sample.memory_total_bytes, sample.memory_available_bytes) == (4 * GIB, GIB)


@pytest.mark.parametrize("limit", ["max", V1_NO_LIMIT])
def test_memory_is_that_of_the_machine_without_a_cgroup_limit(machine: Machine, limit: int | str) -> None:
    if limit == "max":
        machine.write_v2_memory("", limit, usage=9 * GIB)
    else:
        machine.write("proc/self/cgroup", "4:memory:/")
        machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", limit)
    sample = machine.monitor().latest
    assert (sample.memory_total_bytes, sample.memory_available_bytes) == (16 * GIB, 12 * GIB)


def test_a_machine_that_reports_nothing_gives_none_and_one_log_line_for_each_sensor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> tuple[int, int]:
        raise psutil.AccessDenied

    monitor = Monitor(root=tmp_path, nvml=None, cpus=lambda: {0, 1, 2}, memory_bytes=broken)
    monitor.sample()
    sample = monitor.sample()
    assert (sample.cores, sample.gpus) == (3, ())
    assert sample.own_cpu_utilization is not None
    assert sample.cpu_utilization is sample.others_cores is sample.cpu_pressure is sample.memory_pressure is None
    assert sample.memory_total_bytes is sample.memory_available_bytes is None
    sensors = ["cgroups", "memory", "CPU times", "CPU pressure", "memory pressure"]
    assert [line.split(":")[0] for line in log_lines(caplog)] == [f"continuing without {sensor}" for sensor in sensors]


@pytest.mark.parametrize(
    ("path", "figure"),
    [
        ("proc/stat", "cpu_utilization"),
        ("proc/pressure/cpu", "cpu_pressure"),
        ("proc/pressure/memory", "memory_pressure"),
        ("sys/fs/cgroup/cpu.max", "cgroup_quota_cores"),
        ("sys/fs/cgroup/cpu.stat", "cgroup_throttled_fraction"),
        ("sys/fs/cgroup/memory.max", "memory_available_bytes"),
        ("sys/fs/cgroup/memory.stat", "memory_available_bytes"),
    ],
)
@pytest.mark.parametrize("garbage", ["", "gibberish", "0 0", "\ncpu0 one two\nsome total=x"])
def test_a_garbled_file_gives_none_and_one_log_line_until_it_is_readable_again(
    machine: Machine, caplog: pytest.LogCaptureFixture, path: str, figure: str, garbage: str
) -> None:
    machine.write_v2("", quota="100000")
    machine.write_v2_memory("", 8 * GIB, usage=GIB)
    monitor = machine.monitor()
    sound = (machine.root / path).read_text().rstrip()
    for _ in range(3):
        machine.write(path, garbage)
        machine.now += 1
        sample = monitor.sample()
        assert getattr(sample, figure) is None
        assert sample.process_rss_bytes == 300
    assert len(caplog.records) == 1
    machine.write(path, sound)
    for step in (1, 2):
        machine.now += 1
        machine.write_cpu_ticks({0: (500 + step, 500), 1: (100, 900)})
        sample = monitor.sample()
    assert getattr(sample, figure) is not None


@pytest.mark.parametrize("sensor", ["process_time", "cpus", "memory_bytes", "rss_bytes"])
@pytest.mark.parametrize("error", [OSError("gone"), psutil.NoSuchProcess(1), TypeError("a bug")])
def test_an_error_of_a_sensor_never_reaches_the_caller(
    machine: Machine, caplog: pytest.LogCaptureFixture, sensor: str, error: Exception
) -> None:
    def broken() -> object:
        raise error

    monitor = machine.monitor(**{sensor: broken})
    machine.now += 1
    sample = monitor.sample()
    figures = {
        "process_time": sample.own_cpu_utilization,
        "memory_bytes": sample.memory_total_bytes,
        "rss_bytes": sample.process_rss_bytes,
    }
    assert figures.get(sensor) is None
    assert sum(figure is None for figure in figures.values()) == (sensor in figures)
    assert sample.cores >= 1
    (record,) = caplog.records
    is_bug = isinstance(error, TypeError)
    assert record.levelname == ("ERROR" if is_bug else "INFO")
    assert bool(record.exc_info) == is_bug, "an unexpected error is logged with its traceback"


class FakeNvml(ModuleType):
    """NVML with two GPUs; the functions named in `broken` raise an NVMLError."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    nvmlDeviceGetHandleByIndex: Callable[..., object]  # noqa: N815 # NVML's name

    class NVMLError(Exception):
        pass

    def __init__(self, *broken: str) -> None:
        super().__init__("fake_nvml")
        self.calls: list[str] = []
        self.mask = 0
        answers: dict[str, Callable[..., object]] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
            "nvmlDeviceGetName": lambda handle: f"GPU of {handle}",
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=37, memory=12),
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=8 * GIB, free=3 * GIB, used=5 * GIB),
            "nvmlDeviceGetClockInfo": lambda _, kind: {1: 1200}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda _, kind: {1: 1980}[kind],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: self.mask,
            "nvmlDeviceGetTemperature": lambda _, sensor: {0: 61}[sensor],
            "nvmlDeviceGetPowerUsage": lambda _: 250_500,
        }
        for name, answer in answers.items():
            setattr(self, name, self.recorded(name, self.refuse if name in broken else answer))

    def recorded(self, name: str, answer: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            self.calls.append(name)
            return answer(*args)

        return call

    def refuse(self, *_: object) -> object:
        raise self.NVMLError("Not Supported")


def test_every_gpu_reports_its_values_in_base_units(machine: Machine) -> None:
    nvml = FakeNvml()
    first, second = machine.monitor(nvml).latest.gpus
    assert first == GpuSnapshot(
        index=0,
        name="GPU of handle 0",
        utilization=0.37,
        memory_total_bytes=8 * GIB,
        memory_free_bytes=3 * GIB,
        sm_clock_hz=1.2e9,
        max_sm_clock_hz=1.98e9,
        throttle_reasons=(),
        temperature_celsius=61,
        power_watts=250.5,
    )
    assert (second.index, second.name) == (1, "GPU of handle 1")


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        (0x1, ("gpu_idle",)),
        (0x4, ("sw_power_cap",)),
        (0x8 | 0x40, ("hw_slowdown", "hw_thermal_slowdown")),
        (0x20, ("sw_thermal_slowdown",)),
        (0x80, ("hw_power_brake_slowdown",)),
        (0x400 | 0x800, ("reliability", "bit_11")),
    ],
)
def test_throttle_reasons_have_the_names_of_nvml(machine: Machine, mask: int, reasons: tuple[str, ...]) -> None:
    nvml = FakeNvml()
    monitor = machine.monitor(nvml)
    nvml.mask = mask
    assert monitor.sample().gpus[0].throttle_reasons == reasons


@pytest.mark.parametrize(
    ("function", "figures"),
    [
        ("Name", {"name"}),
        ("UtilizationRates", {"utilization"}),
        ("MemoryInfo", {"memory_total_bytes", "memory_free_bytes"}),
        ("ClockInfo", {"sm_clock_hz"}),
        ("MaxClockInfo", {"max_sm_clock_hz"}),
        ("CurrentClocksThrottleReasons", {"throttle_reasons"}),
        ("Temperature", {"temperature_celsius"}),
        ("PowerUsage", {"power_watts"}),
    ],
)
def test_a_value_that_a_gpu_does_not_report_is_none_with_one_log_line_per_gpu(
    machine: Machine, caplog: pytest.LogCaptureFixture, function: str, figures: set[str]
) -> None:
    monitor = machine.monitor(FakeNvml(f"nvmlDeviceGet{function}"))
    for gpu in monitor.sample().gpus:
        assert {name for name in GpuSnapshot.__dataclass_fields__ if getattr(gpu, name) is None} == figures
    expected = [f"continuing without {function} of GPU {index}: NVMLError: Not Supported" for index in (0, 1)]
    assert log_lines(caplog) == expected


def test_a_function_that_this_version_of_nvml_lacks_gives_none(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml()
    del nvml.nvmlDeviceGetTemperature
    gpu = machine.monitor(nvml).latest.gpus[0]
    assert gpu.temperature_celsius is None
    assert gpu.power_watts == 250.5
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


def test_a_lost_gpu_does_not_hide_the_others(machine: Machine) -> None:
    nvml = FakeNvml()
    nvml.nvmlDeviceGetHandleByIndex = lambda index: nvml.refuse() if index == 0 else "handle 1"
    assert [gpu.index for gpu in machine.monitor(nvml).latest.gpus] == [1]


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_missing_driver_gives_no_gpus_and_one_log_line(
    machine: Machine, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    nvml = FakeNvml(function)
    monitor = machine.monitor(nvml)
    assert monitor.sample().gpus == ()
    monitor.close()
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert nvml.calls.count("nvmlInit") == 1
    assert nvml.calls.count("nvmlShutdown") == (function != "nvmlInit"), "NVML that did not start is not shut down"


def test_closing_shuts_nvml_down_once_and_later_samples_have_no_gpus(machine: Machine) -> None:
    nvml = FakeNvml()
    monitor = machine.monitor(nvml)
    monitor.close()
    monitor.close()
    assert monitor.sample().gpus == ()
    assert nvml.calls[-1] == "nvmlShutdown"
    assert nvml.calls.count("nvmlShutdown") == 1


def test_closing_ignores_an_nvml_that_fails_to_shut_down(machine: Machine) -> None:
    machine.monitor(FakeNvml("nvmlShutdown")).close()


class Timer:
    """Sleeps by moving the machine's clock, 10 ms late each time, and cancels the run after a number of sleeps."""

    def __init__(self, machine: Machine, sleeps: int) -> None:
        self.machine = machine
        self.sleeps_left = sleeps
        self.sampled_at: list[float] = []
        self.threads: set[threading.Thread] = set()
        self.sampling_s = [0.0] * (sleeps + 1)  # how long each sample takes; the first is the constructor's

    async def sleep(self, seconds: float) -> None:
        if not self.sleeps_left:
            raise asyncio.CancelledError
        self.sleeps_left -= 1
        self.machine.now += max(0.0, seconds) + 0.01

    def rss_bytes(self) -> int:
        self.sampled_at.append(self.machine.now)
        self.threads.add(threading.current_thread())
        self.machine.now += self.sampling_s[len(self.sampled_at) - 1]
        return 300

    async def run(self, monitor: Monitor) -> None:
        with pytest.raises(asyncio.CancelledError):
            await monitor.run(0.25)


@pytest.mark.anyio
async def test_samples_do_not_drift_although_every_sleep_ends_late(machine: Machine) -> None:
    timer = Timer(machine, sleeps=100)
    monitor = machine.monitor(rss_bytes=timer.rss_bytes, sleep=timer.sleep)
    await timer.run(monitor)
    assert timer.sampled_at[1:] == pytest.approx([1000 + 0.25 * tick + 0.01 for tick in range(1, 101)])
    assert monitor.latest.taken_at == pytest.approx(1025.01)


@pytest.mark.anyio
async def test_ticks_missed_during_a_slow_sample_are_skipped(machine: Machine) -> None:
    timer = Timer(machine, sleeps=4)
    timer.sampling_s[2] = 0.6
    monitor = machine.monitor(rss_bytes=timer.rss_bytes, sleep=timer.sleep)
    await timer.run(monitor)
    assert timer.sampled_at[1:] == pytest.approx([1000.26, 1000.51, 1001.26, 1001.51])


@pytest.mark.anyio
async def test_samples_are_taken_on_a_separate_thread_that_ends_with_the_monitor(machine: Machine) -> None:
    timer = Timer(machine, sleeps=2)
    monitor = machine.monitor(rss_bytes=timer.rss_bytes, sleep=timer.sleep)
    timer.threads.clear()
    await timer.run(monitor)
    (thread,) = timer.threads
    assert thread.name == "monitor_0"
    monitor.close()
    assert not thread.is_alive()


@pytest.mark.anyio
async def test_a_bug_in_a_sample_is_logged_and_does_not_end_the_run(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = Timer(machine, sleeps=4)
    monitor = machine.monitor(rss_bytes=timer.rss_bytes, sleep=timer.sleep)
    sample, calls = monitor.sample, iter(range(4))

    def buggy() -> object:
        if next(calls) < 2:
            raise TypeError("a bug")
        return sample()

    monkeypatch.setattr(monitor, "sample", buggy)
    await timer.run(monitor)
    assert monitor.latest.taken_at == pytest.approx(1001.01)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info


def test_the_real_machine_can_be_sampled() -> None:
    monitor = Monitor()
    before = monitor.latest
    sample = monitor.sample()
    monitor.close()
    assert sample.taken_at > before.taken_at
    assert 0 < sample.cores <= (sample.cpus or 0)
    assert 0 < (sample.process_rss_bytes or 0) < (sample.memory_total_bytes or 0)
    assert 0 <= (sample.own_cpu_utilization or 0) <= 1
