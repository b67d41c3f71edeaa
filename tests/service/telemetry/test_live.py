import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.machine.snapshot import GpuSnapshot, ResourceSnapshot
from service.telemetry.live import read_sample
from service.telemetry.metrics import Metrics
from tests.service.telemetry.test_metrics import SMALL, answer


def test_a_sample_holds_the_counts_and_the_current_values() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.describe([SMALL.subnetwork], "model", "1")
    for total_s in (0.3, 0.4, 0.6):
        metrics.request_started()
        metrics.answered(answer(total_s=total_s))
        metrics.request_finished("ok")
    metrics.request_started()
    metrics.request_finished("overloaded", "full")
    metrics.request_started()
    snapshot = ResourceSnapshot(
        taken_at=0,
        cores=4,
        cpus=4,
        own_cpu_utilization=0.25,
        others_cores=2.0,
        gpus=(GpuSnapshot(0, utilization=0.5),),
    )
    metrics.machine(snapshot, queued=7, slowdown=1.0, safety_factor=1.0)
    sample = read_sample(metrics.registry(), clock=lambda: 5.0)
    assert sample.at == 5
    assert (sample.requests["ok"], sample.requests["overloaded"]) == (3, 1)
    assert sample.subnetworks == {"8@0.55": 3}
    assert (sample.met, sample.missed) == (2, 2)
    assert sample.accuracy_loss == pytest.approx(0.15)
    assert (sample.spent_gflops, sample.saved_gflops) == (1.5, 4.5)
    assert (sample.queued, sample.in_flight) == (7, 1)
    assert (sample.own_cpu, sample.others_cpu, sample.gpu) == (0.25, 0.5, 0.5)


def test_a_sample_can_be_read_before_the_first_answer() -> None:
    sample = read_sample(CollectorRegistry(), clock=lambda: 5.0)
    assert (sample.requests, sample.subnetworks, sample.met, sample.own_cpu, sample.gpu) == ({}, {}, 0, 0, None)


def test_counts_of_several_workers_are_summed_and_utilizations_averaged(tmp_path: Path) -> None:
    worker = """
import sys, time
from service.machine.snapshot import ResourceSnapshot
from service.telemetry.metrics import Metrics, process_registry
metrics = Metrics(process_registry(), sys.argv[1])
metrics.request_started()
metrics.request_finished("ok")
utilization = float(sys.argv[2])
metrics.machine(ResourceSnapshot(taken_at=0, cores=1, own_cpu_utilization=utilization), 2, 1.0, 1.0)
print("counted", flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(tmp_path), utilization],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for utilization in ("0.25", "0.75")
    ]
    try:
        for process in workers:
            assert process.stdout is not None
            assert process.stdout.readline() == b"counted\n"
        sample = read_sample(Metrics(CollectorRegistry(), str(tmp_path)).registry())
    finally:
        for process in workers:
            process.communicate(b"")
    assert sample.requests["ok"] == 2
    assert sample.queued == 4
    assert sample.own_cpu == 0.5
