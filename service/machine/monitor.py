"""Samples CPU, cgroup, pressure, memory and GPUs on a timer, off the request path, and keeps the latest sample.

A sensor that is missing or fails is None in the sample and one line in the log, never an error. Judging the values is
left to the policy.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import psutil
import pynvml  # type: ignore[import-untyped] # nvidia-ml-py publishes no types

from service.machine.snapshot import Counters, GpuSnapshot, Interval, ResourceSnapshot, throttle_reasons

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Monitor:
    """Samples the machine. Only one thread at a time may sample; any thread may read the latest sample."""

    def __init__(
        self,
        *,
        root: Path = Path("/"),
        nvml: ModuleType | None = pynvml,
        clock: Callable[[], float] = time.monotonic,
        process_time: Callable[[], float] = time.process_time,
        cpus: Callable[[], Collection[int]] = lambda: os.sched_getaffinity(0),
        memory_bytes: Callable[[], tuple[int, int]] = lambda: psutil.virtual_memory()[:2],
        rss_bytes: Callable[[], int] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Find the sensors and take the first sample, in which all values over an interval are None.

        Args:
            root: folder that holds proc/ and sys/fs/cgroup/.
            nvml: the module pynvml or a substitute; None for no GPUs.
            clock: monotonic, in seconds.
            process_time: CPU seconds of this process, all threads.
            cpus: CPUs that this process may run on, numbered as in proc/stat.
            memory_bytes: total and available memory of the machine.
            rss_bytes: resident memory of this process; from psutil by default.
            sleep: waits for a number of seconds.
        """
        self._guard = _Guard(nvml)
        self._clock, self._process_time, self._sleep = clock, process_time, sleep
        process = psutil.Process()  # created once, because that reads more files than a query
        self._cpus, self._memory_bytes = cpus, memory_bytes
        self._rss_bytes = rss_bytes or (lambda: process.memory_info().rss)
        self._proc_stat, self._cgroup = root / "proc/stat", _Cgroup(root, self._guard)
        self._nvml, self._gpus = nvml, self._guard("GPUs", partial(_start_gpus, nvml, self._guard)) if nvml else None
        # Not on the event loop: NVML may take milliseconds while others use the driver.
        self._thread = ThreadPoolExecutor(1, "monitor")
        self._counters = Counters(clock())
        self._latest = self.sample()

    @property
    def latest(self) -> ResourceSnapshot:
        """The latest sample."""
        return self._latest

    async def run(self, interval_s: float) -> None:
        """Sample every `interval_s` until cancelled, despite failures; ticks do not drift, missed ones are skipped."""
        started_at, tick = self._clock(), 0
        while True:
            tick = max(tick + 1, math.ceil((self._clock() - started_at) / interval_s))
            await self._sleep(started_at + tick * interval_s - self._clock())
            await asyncio.get_running_loop().run_in_executor(self._thread, self._guard, "a sample", self.sample)

    def close(self) -> None:
        """Wait for a running sample, end the thread, and shut NVML down."""
        self._thread.shutdown()
        if self._nvml and self._gpus is not None:
            self._guard("NVML shutdown", self._nvml.nvmlShutdown)
        self._gpus = None

    def sample(self) -> ResourceSnapshot:
        """Read every sensor once, and return the sample; blocks."""
        cpus = self._guard("CPU affinity", self._cpus) or range(os.cpu_count() or 1)
        quotas_cores = self._guard("CPU quota", self._cgroup.read_quotas_cores) or {}
        cores = min([len(cpus), *quotas_cores.values()])
        memory_bytes = self._guard("memory", lambda: self._cgroup.read_memory_bytes(*self._memory_bytes()))
        interval = Interval(self._counters, self._read_counters(cpus, quotas_cores))
        self._counters = interval.after
        self._latest = ResourceSnapshot(
            taken_at=interval.after.taken_at,
            cores=cores,
            cpus=len(cpus),
            cpu_utilization=interval.cpu_utilization(cpus),
            own_cpu_utilization=interval.own_cpu_utilization(cores),
            others_cores=interval.others_cores(cpus),
            cgroup_quota_cores=min(quotas_cores.values(), default=None),
            cgroup_throttled_fraction=interval.throttled_fraction(),
            cpu_pressure=interval.cpu_pressure(),
            memory_pressure=interval.memory_pressure(),
            memory_total_bytes=memory_bytes and memory_bytes[0],
            memory_available_bytes=memory_bytes and memory_bytes[1],
            process_rss_bytes=self._guard("resident memory", self._rss_bytes),
            gpus=tuple(read() for read in self._gpus or ()),
        )
        return self._latest

    def _read_counters(self, cpus: Iterable[int], cgroups: Iterable[Path]) -> Counters:
        guard = self._guard
        return Counters(
            taken_at=self._clock(),
            own_cpu_s=guard("own CPU time", self._process_time),
            cpu_ticks=guard("CPU times", partial(_read_cpu_ticks, self._proc_stat, cpus)) or {},
            quota_periods=guard("throttling", lambda: {str(group): _read_periods(group) for group in cgroups}) or {},
            cpu_stall_s=guard("CPU pressure", partial(_read_stall_s, self._cgroup.cpu_pressure)),
            memory_stall_s=guard("memory pressure", partial(_read_stall_s, self._cgroup.memory_pressure)),
        )


class _Guard:
    """Returns None for a sensor that fails, and logs its first failure."""

    def __init__(self, nvml: ModuleType | None) -> None:
        # AttributeError: the platform, or this version of NVML, lacks the call.
        expected = (OSError, ValueError, LookupError, ArithmeticError, AttributeError, psutil.Error)
        self._expected: tuple[type[Exception], ...] = (*expected, nvml.NVMLError) if nvml else expected
        self._failed: set[str] = set()

    def __call__(self, sensor: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except Exception as error:  # a missing or broken sensor must not keep requests from their answers
            if sensor not in self._failed:
                self._failed.add(sensor)
                log = logger.info if isinstance(error, self._expected) else logger.exception
                log("continuing without %s: %s: %s", sensor, type(error).__name__, error)
            return None


class _Cgroup:
    """The limits of this process's own cgroup and of every visible one above it, in v1 and v2."""

    def __init__(self, root: Path, guard: _Guard) -> None:
        cpu, memory = (guard("cgroups", partial(_lineage, root, name)) or [] for name in ("cpu", "memory"))
        self._quotas = list(_files(cpu, "cpu.max", "cpu.cfs_quota_us"))
        self._limits = list(_files(memory, "memory.max", "memory.limit_in_bytes"))
        self.cpu_pressure = next(_files(cpu, "cpu.pressure"), root / "proc/pressure/cpu")
        self.memory_pressure = next(_files(memory, "memory.pressure"), root / "proc/pressure/memory")

    def read_quotas_cores(self) -> dict[Path, float]:
        """Map the folder of each cgroup with a quota to the cores' worth of CPU time that it grants."""
        quotas = {file.parent: _read_quota_cores(file) for file in self._quotas}
        return {folder: quota for folder, quota in quotas.items() if quota is not None}

    def read_memory_bytes(self, machine_total: int, machine_available: int) -> tuple[int, int]:
        """Limit the machine's total and available bytes to what the cgroups allow."""
        total, available = machine_total, machine_available
        for file in self._limits:
            limit = file.read_text().strip()
            if limit != "max" and int(limit) < machine_total:  # v1 says 8 EiB for no limit
                total = min(total, int(limit))
                available = min(available, max(0, int(limit) - _read_memory_in_use_bytes(file)))
        return total, available


def _lineage(root: Path, controller: str) -> list[Path]:
    """List this process's cgroups for a controller, in v1 and v2: its own first, then its ancestors."""
    base, lineage = root / "sys/fs/cgroup", []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            mounts = (base / controller, base / controllers) if controllers else (base / "unified", base)
            mount = next(filter(Path.is_dir, mounts), base)
            # A path of another namespace leads out of the mount, or nowhere; the visible cgroups begin at the mount.
            own = mount if ".." in path.split("/") else mount / path.lstrip("/")
            lineage += [folder for folder in (own, *own.parents) if folder.is_relative_to(mount)]
    return lineage


def _files(folders: Iterable[Path], *names: str) -> Iterator[Path]:
    return (folder / name for folder in folders for name in names if (folder / name).exists())


def _read_table(file: Path) -> dict[str, int]:
    return {key: int(value) for key, value in map(str.split, file.read_text().splitlines())}


def _read_quota_cores(file: Path) -> float | None:
    """Read cpu.max, which holds quota and period, or cpu.cfs_quota_us, whose period is in a file beside it."""
    quota, *period = file.read_text().split()
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period[0] if period else file.with_name("cpu.cfs_period_us").read_text())


def _read_periods(cgroup: Path) -> tuple[int, int]:
    stat = _read_table(cgroup / "cpu.stat")
    return stat["nr_periods"], stat["nr_throttled"]


def _read_memory_in_use_bytes(limit: Path) -> int:
    """Read the memory in use by a cgroup, less its inactive cached files, which count as free, as in Kubernetes."""
    is_v2 = limit.name == "memory.max"
    usage, cached = ("memory.current", "inactive_file") if is_v2 else ("memory.usage_in_bytes", "total_inactive_file")
    return int(limit.with_name(usage).read_text()) - _read_table(limit.with_name("memory.stat"))[cached]


def _read_stall_s(file: Path) -> float:
    """Return in seconds the total microseconds of a first line like: some avg10=0.00 avg60=0.00 avg300=0.00 total=0."""
    return int(file.read_text().partition("total=")[2].split()[0]) / 1e6


def _read_cpu_ticks(file: Path, cpus: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Read the busy and idle ticks of CPUs; user and nice include guest time, which is behind the eight fields read."""
    ticks = {}
    for name, *fields in map(str.split, file.read_text().partition("\nintr")[0].splitlines()[1:]):
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
        ticks[int(name.removeprefix("cpu"))] = (user + nice + system + irq + softirq + steal, idle + iowait)
    return {cpu: ticks[cpu] for cpu in cpus}


def _start_gpus(nvml: ModuleType, guard: _Guard) -> list[Callable[[], GpuSnapshot]]:
    """Return a reader for each GPU; raises NVML's error if there is no library or no driver."""
    nvml.nvmlInit()
    count = guard("the number of GPUs", nvml.nvmlDeviceGetCount) or 0
    handles = [guard(f"GPU {index}", partial(nvml.nvmlDeviceGetHandleByIndex, index)) for index in range(count)]
    return [partial(_read_gpu, nvml, guard, *gpu) for gpu in enumerate(handles) if gpu[1] is not None]


def _read_gpu(nvml: ModuleType, guard: _Guard, index: int, handle: object) -> GpuSnapshot:
    def ask(figure: str, *args: int) -> Any:  # noqa: ANN401 # NVML has no types
        return guard(f"{figure} of GPU {index}", lambda: getattr(nvml, f"nvmlDeviceGet{figure}")(handle, *args))

    rates, memory, reasons = ask("UtilizationRates"), ask("MemoryInfo"), ask("CurrentClocksThrottleReasons")
    mhz, max_mhz = ask("ClockInfo", nvml.NVML_CLOCK_SM), ask("MaxClockInfo", nvml.NVML_CLOCK_SM)
    milliwatts = ask("PowerUsage")
    return GpuSnapshot(
        index=index,
        name=ask("Name"),
        utilization=rates and rates.gpu / 100,
        memory_total_bytes=memory and memory.total,
        memory_free_bytes=memory and memory.free,
        sm_clock_hz=mhz and mhz * 1e6,
        max_sm_clock_hz=max_mhz and max_mhz * 1e6,
        throttle_reasons=None if reasons is None else throttle_reasons(reasons),
        temperature_celsius=ask("Temperature", nvml.NVML_TEMPERATURE_GPU),
        power_watts=milliwatts and milliwatts / 1e3,
    )
