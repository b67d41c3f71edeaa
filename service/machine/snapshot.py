"""The state of the machine at an instant, as values: `monitor` reads them; nothing is read here.

Utilizations and shares are fractions 0..1. Values that the machine does not report are None. "Over the interval" means
since the previous sample, so the first sample has None there.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# Names of the bits of NVML's mask of throttle reasons, from the lowest on, as NVML has them.
THROTTLE_REASONS = (
    "gpu_idle",
    "applications_clocks_setting",
    "sw_power_cap",
    "hw_slowdown",
    "sync_boost",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "display_clock_setting",
    "board_limit",
    "reliability",
)


def throttle_reasons(mask: int) -> tuple[str, ...]:
    """Return the names of the bits that are set; bit 11, say, without a name, is "bit_11"."""
    names = dict(enumerate(THROTTLE_REASONS))
    return tuple(names.get(bit, f"bit_{bit}") for bit in range(mask.bit_length()) if mask >> bit & 1)


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """The state of one GPU, as NVML reports it.

    Attributes:
        index: NVML's index, in the order of the bus; CUDA counts differently, and under CUDA_VISIBLE_DEVICES fewer.
        name: name of the product.
        utilization: share of the driver's own last interval (1/6 s to 1 s) in which a kernel of any process ran; it
            does not say how much of the GPU the kernel filled.
        memory_total_bytes: total memory.
        memory_free_bytes: memory that is not allocated; PyTorch's cache counts as allocated.
        sm_clock_hz: current clock of the multiprocessors.
        max_sm_clock_hz: highest clock of the multiprocessors.
        throttle_reasons: why the clock is not higher, from THROTTLE_REASONS; gpu_idle and the settings are no sign of
            trouble. Empty where there is no reason.
        temperature_celsius: temperature of the die.
        power_watts: power drawn by the board.
    """

    index: int
    name: str | None = None
    utilization: float | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    sm_clock_hz: float | None = None
    max_sm_clock_hz: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None


@dataclass(frozen=True, slots=True)
class ResourceSnapshot:
    """The state of the part of the machine that this process may use.

    Attributes:
        taken_at: instant of the sample, in seconds on the monotonic clock.
        cores: number of cores that this process may keep busy: its CPUs, or the cgroup's quota where that is tighter.
        cpus: number of CPUs that this process may run on by affinity and cpuset. Other processes use these, not our
            quota: about min(cores, cpus - others_cores) is left to us.
        cpu_utilization: share of those CPUs' time over the interval in which they were busy, with any process; time
            that a hypervisor took away counts as busy.
        own_cpu_utilization: CPU seconds of this process, all its threads, divided by the interval times `cores`.
        others_cores: cores' worth of work on those CPUs over the interval that was not this process's; at least 0.
        cgroup_quota_cores: CPU seconds per second that the cgroup grants, or the tightest above it; None for no quota.
        cgroup_throttled_fraction: share of the quota's periods (100 ms by default) that ended in the interval in which
            the cgroup had used its quota up and was stopped; 0 if no period ended, None without a quota. That of the
            most throttled cgroup where cgroups above have quotas too.
        cpu_pressure: share of the interval in which some task of our cgroup was ready but waited for a CPU (PSI some);
            that of the whole machine where cgroups do not report it.
        memory_pressure: share of the interval in which some task waited for memory to be reclaimed or read back.
        memory_total_bytes: the machine's memory, or the cgroup's limit where that is tighter.
        memory_available_bytes: memory that can still be allocated without swapping, within that limit.
        process_rss_bytes: resident memory of this process.
        gpus: every GPU that NVML reports.
    """

    taken_at: float
    cores: float
    cpus: int | None = None
    cpu_utilization: float | None = None
    own_cpu_utilization: float | None = None
    others_cores: float | None = None
    cgroup_quota_cores: float | None = None
    cgroup_throttled_fraction: float | None = None
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    process_rss_bytes: int | None = None
    gpus: tuple[GpuSnapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class Counters:
    """Values of the counters that only grow, at an instant.

    Attributes:
        taken_at: instant of the reading, in seconds on the monotonic clock.
        own_cpu_s: CPU seconds of this process.
        cpu_ticks: busy and idle clock ticks of each CPU.
        quota_periods: periods that ended, and those of them throttled, by folder of each cgroup with a quota.
        cpu_stall_s: time in which some task waited for a CPU.
        memory_stall_s: time in which some task waited for memory.
    """

    taken_at: float
    own_cpu_s: float | None = None
    cpu_ticks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    quota_periods: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cpu_stall_s: float | None = None
    memory_stall_s: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """Changes between two readings of the counters; None if a reading lacks the counter or the counter decreased."""

    before: Counters
    after: Counters

    def own_cpu_utilization(self, cores: float) -> float | None:
        """Return this process's share of the time of `cores` cores."""
        return self._share_of_time(self.before.own_cpu_s, self.after.own_cpu_s, cores)

    def cpu_utilization(self, cpus: Collection[int]) -> float | None:
        """Return the share of the CPUs' time used by all processes, from the kernel's ticks, usually of 10 ms."""
        before, after = self.before.cpu_ticks, self.after.cpu_ticks
        known = [(before[cpu], after[cpu]) for cpu in cpus if cpu in before and cpu in after]
        # The kernel's idle counters may step back a little.
        at_work = sum(max(0, new[0] - old[0]) for old, new in known)
        idle = sum(max(0, new[1] - old[1]) for old, new in known)
        return _share(at_work, at_work + idle)

    def others_cores(self, cpus: Collection[int]) -> float | None:
        """Return how many cores' worth of these CPUs' time other processes used."""
        total, own = self.cpu_utilization(cpus), self.own_cpu_utilization(len(cpus))
        return None if total is None or own is None else max(0.0, total - own) * len(cpus)

    def throttled_fraction(self) -> float | None:
        """Return the share of throttled periods of the most throttled cgroup."""
        before, after = self.before.quota_periods, self.after.quota_periods
        known = [(before[folder], after[folder]) for folder in after if folder in before]
        shares = [_share(new[1] - old[1], max(1, new[0] - old[0])) for old, new in known]
        return max((share for share in shares if share is not None), default=None)

    def cpu_pressure(self) -> float | None:
        """Return the share of the interval in which some task waited for a CPU."""
        return self._share_of_time(self.before.cpu_stall_s, self.after.cpu_stall_s)

    def memory_pressure(self) -> float | None:
        """Return the share of the interval in which some task waited for memory."""
        return self._share_of_time(self.before.memory_stall_s, self.after.memory_stall_s)

    def _share_of_time(self, before_s: float | None, after_s: float | None, lanes: float = 1) -> float | None:
        if before_s is None or after_s is None:
            return None
        return _share(after_s - before_s, (self.after.taken_at - self.before.taken_at) * lanes)


def prior_slowdown(snapshot: ResourceSnapshot | None, threads: int) -> float:
    """Predict the slowdown by the load of other processes, before a batch has measured it.

    The kernel's scheduler shares the cores evenly between `threads` threads of ours and as many others as they keep
    cores busy.
    """
    if snapshot is None or snapshot.others_cores is None:
        return 1.0
    cpus = snapshot.cpus or snapshot.cores
    return max(1.0, (min(threads, cpus) + snapshot.others_cores) / cpus)


def _share(part: float, whole: float) -> float | None:
    return min(1.0, part / whole) if part >= 0 and whole > 0 else None
