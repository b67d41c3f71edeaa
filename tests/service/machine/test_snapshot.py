import pytest

from service.machine.snapshot import ResourceSnapshot, prior_slowdown


@pytest.mark.parametrize(
    ("threads", "cpus", "others_cores", "expected"),
    [
        (8, 8, 0.0, 1.0),
        (8, 8, 4.0, 1.5),
        (8, 8, 8.0, 2.0),
        (4, 8, 4.0, 1.0),  # the others have cores of their own
        (4, 8, 6.0, 1.25),
        (16, 8, 4.0, 1.5),  # no more threads run at once than there are CPUs
    ],
)
def test_the_predicted_slowdown_assumes_that_cores_are_shared_evenly_with_other_processes(
    threads: int, cpus: int, others_cores: float, expected: float
) -> None:
    snapshot = ResourceSnapshot(taken_at=0.0, cores=cpus, cpus=cpus, others_cores=others_cores)
    assert prior_slowdown(snapshot, threads) == expected


def test_other_processes_on_cpus_beyond_our_quota_cause_no_slowdown() -> None:
    snapshot = ResourceSnapshot(taken_at=0.0, cores=2.0, cpus=8, others_cores=6.0)
    assert prior_slowdown(snapshot, threads=2) == 1.0


def test_no_slowdown_is_predicted_without_measurements_of_the_machine() -> None:
    assert prior_slowdown(None, 4) == 1.0
    assert prior_slowdown(ResourceSnapshot(taken_at=0.0, cores=4.0), 4) == 1.0
