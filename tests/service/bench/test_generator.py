import asyncio

import pytest

from service.bench.client_protocols import Reply
from service.bench.generator import Exchange, Planned, open_loop
from service.simulation.arrivals import Arrival

ANSWERED = Reply("ok", "cat")


class Time:
    """A clock that moves only while the generator sleeps, after the other tasks have run."""

    def __init__(self, oversleeps_s: float = 0.0) -> None:
        self.now, self._oversleeps_s = 50.0, oversleeps_s

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.now += seconds + self._oversleeps_s


def planned(*instants: float, budget_s: float = 1.0) -> list[Planned]:
    return [Planned(Arrival(at, budget_s), place, "cat") for place, at in enumerate(instants)]


def run(plan: list[Planned], ask: object, time: Time) -> list[Exchange]:
    return asyncio.run(open_loop(plan, ask, time.clock, time.sleep))  # type: ignore[arg-type] # a test's coroutine


def test_no_request_waits_for_the_answer_to_another() -> None:
    time, asked_at, all_asked = Time(), [], asyncio.Event()

    async def ask(one: Planned) -> Reply:
        asked_at.append(time.now - 50)
        if one.photo == 2:
            all_asked.set()
        await all_asked.wait()
        return ANSWERED

    exchanges = run(planned(0.0, 0.25, 4.0), ask, time)
    assert asked_at == [0.0, 0.25, 4.0]
    assert [each.latency_s for each in exchanges] == [4.0, 3.75, 0.0]
    assert [each.is_in_time for each in exchanges] == [False, False, True]


def test_the_lateness_of_the_generator_is_reported_and_included_in_latencies() -> None:
    async def ask(_: Planned) -> Reply:
        return ANSWERED

    exchanges = run(planned(0.0, 1.0, 1.25), ask, Time(oversleeps_s=0.5))
    assert [each.late_s for each in exchanges] == [0.5, 0.5, pytest.approx(0.75)]
    assert [each.latency_s for each in exchanges] == [0.5, 0.5, pytest.approx(0.75)]


def test_exchanges_are_returned_in_order_of_arrival() -> None:
    first_may_end = asyncio.Event()

    async def ask(one: Planned) -> Reply:
        if one.photo == 0:
            await first_may_end.wait()
        first_may_end.set()
        return Reply(f"{one.photo}")

    exchanges = run(planned(0.0, 1.0, 2.0), ask, Time())
    assert [each.reply.code for each in exchanges] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("reply", "latency_s", "in_time", "right"),
    [
        (Reply("ok", "cat"), 1.0, True, True),
        (Reply("ok", "cat"), 1.001, False, True),
        (Reply("ok", "dog"), 0.5, True, False),
        (Reply("overloaded"), 0.1, False, False),
    ],
)
def test_only_an_answer_by_the_deadline_is_in_time(reply: Reply, latency_s: float, in_time: bool, right: bool) -> None:
    [one] = planned(0.0)
    exchange = Exchange(one, 0.0, latency_s, reply)
    assert (exchange.is_in_time, exchange.is_right) == (in_time, right)
