"""What the machine looked like at an instant, as values: read by `monitor`, weighed by `policy`; nothing is read here.

Utilizations and shares are fractions 0..1. What the machine does not say is None. "Over the interval" means since the
sample before this one, so the first sample has None there.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# The bits of NVML's mask of reasons, from the lowest on, by NVML's names.
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
    """Name the bits that are set; one without a name is "bit_11"."""
    names = dict(enumerate(THROTTLE_REASONS))
    return tuple(names.get(bit, f"bit_{bit}") for bit in range(mask.bit_length()) if mask >> bit & 1)


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One GPU, as NVML tells of it.

    Attributes:
        index: NVML's, in the order of the bus; CUDA counts differently, and under CUDA_VISIBLE_DEVICES fewer.
        name: the product's.
        utilization: share of the driver's own last interval (1/6 s to 1 s) in which a kernel of anyone ran; how much
            of the GPU it filled is not told.
        memory_total_bytes: all there is.
        memory_free_bytes: what is not allocated; PyTorch's cache counts as allocated.
        sm_clock_hz: of the multiprocessors, now.
        max_sm_clock_hz: the highest that they may take.
        throttle_reasons: why the clock is not higher, from THROTTLE_REASONS; gpu_idle and the settings are no sign of
            trouble. Empty where there is no reason.
        temperature_celsius: of the die.
        power_watts: drawn by the board.
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
    """The machine as far as this process may use it.

    Attributes:
        taken_at: when, in seconds on the monotonic clock.
        cores: how many this process may keep busy: its CPUs, or the cgroup's quota where that is tighter.
        cpus: how many CPUs it may run on by affinity and cpuset. What others use is taken from these, not from a quota:
            about min(cores, cpus - others_cores) is left to us.
        cpu_utilization: share of those CPUs' time over the interval that was spent at work, for whomever; time that a
            hypervisor took away counts as work.
        own_cpu_utilization: CPU seconds of this process, all its threads, over the interval times `cores`.
        others_cores: cores' worth of work on those CPUs over the interval that was not this process's; at least 0.
        cgroup_quota_cores: CPU seconds per second that the cgroup grants, or the tightest above it; None for no quota.
        cgroup_throttled_fraction: share of the quota's periods (100 ms by default) that ended in the interval in which
            the cgroup had used it up and was stopped; 0 if none ended, None without a quota. Of the worst, where
            cgroups above have quotas too.
        cpu_pressure: share of the interval in which some task of our cgroup was ready but waited for a CPU (PSI some);
            of the whole machine where cgroups have no such figure.
        memory_pressure: likewise, in which some task waited for memory to be reclaimed or read back.
        memory_total_bytes: the machine's, or the cgroup's limit where that is tighter.
        memory_available_bytes: what may still be allocated without swapping, within that limit.
        process_rss_bytes: memory of this process that is resident.
        gpus: every GPU that NVML shows.
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
    """What only ever grows, at an instant.

    Attributes:
        taken_at: when, in seconds on the monotonic clock.
        own_cpu_s: CPU seconds of this process.
        cpu_ticks: of each CPU, clock ticks at work and idle.
        quota_periods: of each cgroup with a quota, by its folder: periods that ended, and those of them throttled.
        cpu_stall_s: time in which some task waited for a CPU.
        memory_stall_s: likewise, for memory.
    """

    taken_at: float
    own_cpu_s: float | None = None
    cpu_ticks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    quota_periods: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cpu_stall_s: float | None = None
    memory_stall_s: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two readings of the counters; None for what one of them lacks or what ran backwards."""

    before: Counters
    after: Counters

    def own_cpu_utilization(self, cores: float) -> float | None:
        """Return this process's share of so many cores."""
        return self._share_of_time(self.before.own_cpu_s, self.after.own_cpu_s, cores)

    def cpu_utilization(self, cpus: Collection[int]) -> float | None:
        """Return the share of all processes in these CPUs, by the kernel's count of ticks, usually 10 ms long."""
        before, after = self.before.cpu_ticks, self.after.cpu_ticks
        known = [(before[cpu], after[cpu]) for cpu in cpus if cpu in before and cpu in after]
        # The kernel's idle counters may step back a little.
        at_work = sum(max(0, new[0] - old[0]) for old, new in known)
        idle = sum(max(0, new[1] - old[1]) for old, new in known)
        return _share(at_work, at_work + idle)

    def others_cores(self, cpus: Collection[int]) -> float | None:
        """Return the cores' worth of these CPUs that was not this process's."""
        total, own = self.cpu_utilization(cpus), self.own_cpu_utilization(len(cpus))
        return None if total is None or own is None else max(0.0, total - own) * len(cpus)

    def throttled_fraction(self) -> float | None:
        """Return the share of throttled periods in the worst of the cgroups."""
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
    """Slowdown to expect from what other processes do, before any batch has felt it.

    The scheduler shares the cores evenly: `threads` of ours and as many of others as they keep busy.
    """
    if snapshot is None or snapshot.others_cores is None:
        return 1.0
    cpus = snapshot.cpus or snapshot.cores
    return max(1.0, (min(threads, cpus) + snapshot.others_cores) / cpus)


def _share(part: float, whole: float) -> float | None:
    return min(1.0, part / whole) if part >= 0 and whole > 0 else None
