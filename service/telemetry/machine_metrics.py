"""Metrics of the machine: CPUs, memory, pressure, GPUs, and the CUDA graphs in their memory."""

from service.machine.snapshot import ResourceSnapshot
from service.telemetry.instruments import Instruments


class MachineMetrics:
    """Gauges of the machine."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics."""
        self._cpu = instruments.gauge(
            "supervit_cpu_utilization_ratio",
            "Fraction of the usable cores in use over the last interval, by this process and by others.",
            "liveall",
            ["by"],
        )
        self._pressure = instruments.gauge(
            "supervit_pressure_ratio",
            "Share of the last interval in which tasks waited for the resource, or share of throttled quota periods.",
            "livemostrecent",
            ["resource"],
        )
        self._gpu = instruments.gauge(
            "supervit_gpu_utilization_ratio", "Fraction of time in which the GPU was busy.", "livemostrecent", ["gpu"]
        )
        self._graphs = instruments.gauge(
            "supervit_cuda_graphs", "Forward passes that the engine holds as CUDA graphs.", "livesum"
        )
        self._graph_memory = instruments.gauge(
            "supervit_cuda_graph_memory_bytes", "GPU memory of the CUDA graphs.", "livesum"
        )
        self._memory = instruments.gauge(
            "supervit_resident_memory_bytes", "Resident memory of the server, shared pages included.", "livesum"
        )

    def observed(self, snapshot: ResourceSnapshot) -> None:
        """Record a snapshot of the machine; a gauge keeps its last value where the snapshot has none."""
        cpus = snapshot.cpus or snapshot.cores  # our quota does not bound what others use
        others = None if snapshot.others_cores is None else snapshot.others_cores / cpus
        gauges = [
            (self._cpu.labels("own"), snapshot.own_cpu_utilization),
            (self._cpu.labels("others"), others),
            (self._pressure.labels("cpu"), snapshot.cpu_pressure),
            (self._pressure.labels("cpu_quota"), snapshot.cgroup_throttled_fraction),
            (self._pressure.labels("memory"), snapshot.memory_pressure),
            (self._memory, snapshot.process_rss_bytes),
            *((self._gpu.labels(gpu.index), gpu.utilization) for gpu in snapshot.gpus),
        ]
        for gauge, value in gauges:
            if value is not None:
                gauge.set(value)

    def captured(self, num_graphs: int, held_bytes: int) -> None:
        """Record the CUDA graphs that the engine holds, and their memory."""
        self._graphs.set(num_graphs)
        self._graph_memory.set(held_bytes)
