from collections.abc import Sequence
from itertools import repeat

import pytest

from service.errors import OverloadedError
from service.execution.throttle import BURST_S, UtilizationLimiter
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import QueuedRequest
from tests.service.granting import constraints_for

MINUTE_S = 60.0
ROUNDING_S = 1e-9


class Machine:
    """A number of cores in virtual time, some of which a batch uses, and a limiter that paces the batches."""

    def __init__(self, ceiling: float | None, cores: float | None, busy_cores: float = 1.0) -> None:
        self.now = 1000.0
        self.used_s = 7.0  # by the start of the process
        self.busy_s = 0.0
        self.busy_cores = busy_cores
        self.limiter = UtilizationLimiter(ceiling, cores, lambda: self.used_s)

    def pause(self) -> float:
        """Wait as the dispatch loop does, until the next batch may run."""
        paused_s = 0.0
        while (pause_s := self.limiter.pause_s(self.now)) > ROUNDING_S:
            self.now += pause_s
            paused_s += pause_s
        return paused_s

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.busy_s += seconds
        self.used_s += seconds * self.busy_cores
        self.limiter.batch_ran(seconds)


@pytest.mark.parametrize(
    ("cores", "busy_cores"),
    [(4.0, 4.0), (4.0, 3.3), (2.0, 2.0), (1.0, 1.0), (2.5, 2.5), (64.0, 60.0), (None, 1.0)],
)
@pytest.mark.parametrize("batch_s", [0.005, 0.05, 1.7])
def test_the_ceiling_holds_over_a_minute_of_saturating_load(
    cores: float | None, busy_cores: float, batch_s: float
) -> None:
    machine = Machine(0.6, cores, busy_cores)
    start_at, used_before_s = machine.now, machine.used_s
    while machine.now < start_at + MINUTE_S:
        machine.pause()
        machine.run(batch_s)
    used_s = machine.busy_s if cores is None else machine.used_s - used_before_s
    assert 0.55 <= used_s / (machine.now - start_at) / (cores or 1.0) <= 0.65


def test_compute_outside_the_batches_counts_towards_the_ceiling() -> None:
    machine = Machine(0.6, 4.0, 3.0)
    start_at, used_before_s = machine.now, machine.used_s
    while machine.now < start_at + MINUTE_S:
        machine.used_s += 0.02  # decoding
        machine.pause()
        machine.run(0.02)
    assert 0.55 <= (machine.used_s - used_before_s) / (machine.now - start_at) / 4 <= 0.65


def test_light_load_is_never_paused() -> None:
    machine = Machine(0.6, 4.0, 4.0)
    paused_s = 0.0
    for _ in range(120):
        paused_s += machine.pause()
        machine.run(0.1)
        machine.now += 0.4  # nothing to do: a fifth of the machine is used
    assert paused_s == 0.0
    assert machine.limiter.throttle_factor == pytest.approx(1 / 0.6)  # with more to do, it would be paused


def test_idle_time_is_credited_only_up_to_the_burst() -> None:
    machine = Machine(0.5, 4.0, 4.0)
    machine.pause()
    machine.now += 3600.0
    start_at = machine.now
    ran_s = 0.0
    while not machine.pause():
        machine.run(0.01)
        ran_s += 0.01
    assert ran_s == pytest.approx(
        BURST_S, abs=0.02
    )  # batches use twice what is refilled, so a credit of BURST_S lasts for BURST_S
    assert machine.now - start_at < 1.0


def test_an_engine_that_cannot_reach_the_ceiling_is_never_paused() -> None:
    machine = Machine(0.6, 4.0, busy_cores=2.0)
    for _ in range(1000):
        assert machine.pause() == 0.0
        machine.run(0.05)
    assert machine.limiter.throttle_factor == 1.0


def test_long_batches_under_light_load_are_never_paused() -> None:
    machine = Machine(0.6, 4.0, 4.0)
    for _ in range(20):
        assert machine.pause() == 0.0
        machine.run(2.0)
        machine.now += 2.0  # half of the machine is used


def test_the_throttle_factor_is_learned_from_the_cores_that_batches_use() -> None:
    machine = Machine(0.5, 4.0, busy_cores=4.0)
    assert machine.limiter.throttle_factor == 1.0
    for busy_cores, factor in ((4.0, 2.0), (3.0, 1.5), (1.0, 1.0)):
        machine.busy_cores = busy_cores
        for _ in range(40):
            machine.pause()
            machine.run(0.1)
        assert machine.limiter.throttle_factor == pytest.approx(factor, rel=0.01)


def test_compute_used_while_nothing_waits_does_not_raise_the_throttle_factor() -> None:
    machine = Machine(0.5, 4.0, busy_cores=4.0)
    for _ in range(40):
        machine.now += 3600.0
        machine.used_s += 36.0  # a hundredth of a core, by the monitor and the health checks
        machine.pause()
        machine.run(0.05)
    assert machine.limiter.throttle_factor == pytest.approx(2.0)


def test_compute_used_after_a_batch_that_never_ran_does_not_raise_the_throttle_factor() -> None:
    machine = Machine(0.5, 4.0, busy_cores=4.0)
    for _ in range(10):
        machine.pause()  # for a batch whose requests then expire
        machine.limiter.idle()
        machine.now += 3600.0
        machine.used_s += 36.0
        machine.pause()
        machine.run(0.05)
    assert machine.limiter.throttle_factor == pytest.approx(2.0)


def test_compute_used_before_the_first_request_causes_no_pause() -> None:
    machine = Machine(0.6, 2.0, busy_cores=2.0)
    machine.now += 3600.0
    machine.used_s += 60.0
    assert machine.pause() == 0.0


def test_without_a_ceiling_no_batch_is_paused() -> None:
    machine = Machine(None, 4.0, 4.0)
    for _ in range(1000):
        assert machine.pause() == 0.0
        machine.run(1.0)
    assert machine.limiter.throttle_factor == 1.0


def serve_a_minute(catalog: VariantCatalog, machine: Machine, gaps_s: Sequence[float]) -> tuple[list[int], int]:
    """Serve arrivals with a budget of 0.5 s; return the levels that answered in time and the number of arrivals."""
    scheduler = Scheduler(catalog, choose_level, 4)
    start_at = next_at = machine.now
    answered: list[int] = []
    count = 0

    def take_in() -> None:
        nonlocal next_at, count
        while next_at <= min(machine.now, start_at + MINUTE_S):
            request = QueuedRequest(next_at + 0.5, constraints_for(0.5, 2))
            count += 1
            try:
                scheduler.admit(request, next_at)
            except OverloadedError:
                pass
            else:
                scheduler.enqueue(request)
            next_at += gaps_s[count % len(gaps_s)]

    while next_at < start_at + MINUTE_S:
        take_in()
        if not len(scheduler):
            machine.now = next_at
            continue
        machine.pause()
        take_in()
        scheduler.throttled(machine.limiter.throttle_factor)
        decision = scheduler.next_batch(machine.now)
        if decision.variant is not None:
            seconds = decision.variant.latency_by_batch_s[len(decision.batch) - 1]
            machine.run(seconds)
            take_in()
            scheduler.batch_completed(decision.variant, len(decision.batch), seconds, machine.now)
            answered += [decision.variant.index for request in decision.batch if machine.now <= request.deadline_at]
    return answered, count


def test_a_ceiling_lowers_the_level_before_deadlines_are_missed(fast_catalog: VariantCatalog) -> None:
    gaps_s = tuple(repeat(1 / 16, 2))  # level 2 keeps the machine busy for 80 % of the time
    free, held = Machine(None, 4.0, 4.0), Machine(0.6, 4.0, 4.0)
    at_best, count = serve_a_minute(fast_catalog, free, gaps_s)
    under_ceiling, _ = serve_a_minute(fast_catalog, held, gaps_s)
    assert len(at_best) >= count - 1  # the last may still wait when the minute is over
    assert len(under_ceiling) >= 0.99 * count
    assert free.busy_s / MINUTE_S > 0.7
    assert 0.4 < held.busy_s / MINUTE_S <= 0.65
    assert sum(under_ceiling) / count < sum(at_best) / count


def test_a_ceiling_holds_under_heavy_overload(fast_catalog: VariantCatalog) -> None:
    machine = Machine(0.6, 4.0, 4.0)
    answered, count = serve_a_minute(fast_catalog, machine, (1 / 200,))
    assert 0.55 <= machine.busy_s / MINUTE_S <= 0.65
    assert len(answered) / MINUTE_S == pytest.approx(0.6 * 80, rel=0.1)  # all that level 0 can answer under the ceiling
    assert count > 4 * len(answered)


def test_compute_beyond_the_ceiling_that_is_not_the_engines_never_stops_the_engine() -> None:
    machine = Machine(0.3, 2.0)
    batches, paused_s = 0, 0.0
    while machine.now < 1000.0 + MINUTE_S:
        if pause_s := machine.limiter.pause_s(machine.now):
            nap_s = min(pause_s, 0.01)
            machine.now += nap_s
            machine.used_s += nap_s  # HTTP keeps a core busy
            paused_s += nap_s
            continue
        assert paused_s <= BURST_S + 0.2 / 0.6 + 0.01, "a burst, and what the last batch took, with what ran beside it"
        machine.run(0.1)
        batches, paused_s = batches + 1, 0.0
    assert batches > 80
