"""Arrivals replayed in virtual time by the very policy and line that serve, and the figures of how that went.

Decoding, the network and the ceiling on utilization are left out.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from service.arrivals import Arrival, SlowdownScript
from service.baselines import fixed_name, make_policy, refuses_early
from service.errors import OverloadedError
from service.line import Line
from service.menu import Menu, Option
from service.situation import Entry, Policy, Wish

AS_PROFILED = SlowdownScript()
ROUNDING_S = 1e-9
PERCENTILES = (50, 95, 99)

Outcome = Literal["in_time", "late", "refused", "hopeless", "shed"]


class Fate(NamedTuple):
    """What became of a request: answered in time or late, refused at admission, or given up by the policy.

    Attributes:
        arrived_at, ended_at: in seconds from the start.
        outcome: "hopeless" could no longer be answered in time, "shed" would have made others late.
        option: index of the option that answered.
    """

    arrived_at: float
    ended_at: float
    outcome: Outcome
    option: int | None = None


class Batch(NamedTuple):
    """A batch that ran: when it started, how long it took, and how many of which option."""

    started_at: float
    seconds: float
    option: int
    size: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Where requests are replayed.

    Attributes:
        menu: its sub-networks with the latencies that the server knows.
        max_batch_size: most that run together.
        slowdown: how much longer batches take than the server knows.
        overhead_s: what each batch takes on top, which the server does not know either.
        noise: how irregular batches are: each takes longer by the absolute value of a normal draw times this.
        seed: of the noise.
    """

    menu: Menu
    max_batch_size: int = 16
    slowdown: SlowdownScript = AS_PROFILED
    overhead_s: float = 0.0
    noise: float = 0.0
    seed: int = 0


class Replay:
    """What happened on one machine: when its engine was free, the policy chose; meanwhile requests arrived.

    Attributes:
        fates: of the requests, in the order in which they ended.
        batches: in the order in which they ran.
    """

    def __init__(self, arrivals: Sequence[Arrival], machine: Machine, policy: Policy, *, early: bool) -> None:
        """Replay arrivals, which ascend, until everyone has an answer or a refusal, if `early` at admission.

        Raises:
            BudgetTooSmallError: no sub-network is as cheap as a request wants it.
        """
        self.fates: list[Fate] = []
        self.batches: list[Batch] = []
        self._machine = machine
        self._line = Line(machine.menu, policy, machine.max_batch_size, refuses_early=early)
        self._rng = np.random.default_rng(machine.seed)
        self._arrived: dict[Entry, float] = {}
        self._coming = list(reversed(arrivals))
        now = 0.0
        while self._coming or len(self._line):
            if not len(self._line):
                now = max(now, self._coming[-1].at)
            self._take_in(now)
            if len(self._line):
                now = self._serve(now)

    def _take_in(self, until: float) -> None:
        while self._coming and self._coming[-1].at <= until:
            arrival = self._coming.pop()
            limit, beyond = self._machine.menu.best_within(arrival.budget_gflops)
            wish = Wish(arrival.budget_s, limit, beyond=beyond)
            entry = Entry(arrival.at + arrival.budget_s, wish, arrival.priority)
            self._arrived[entry] = arrival.at
            try:
                self._line.admit(entry, arrival.at)
            except OverloadedError:
                self._end((entry,), arrival.at, "refused")
            else:
                self._line.enter(entry)

    def _serve(self, now: float) -> float:
        """Do what the policy chooses, and return when the engine is free again."""
        choice = self._line.next_batch(now)
        self._end(choice.late, now, "hopeless")
        self._end(choice.shed, now, "shed")
        if choice.option is None:
            if not choice.late and not choice.shed:
                raise RuntimeError("the policy neither serves nor gives up anybody")
            return now
        size = len(choice.batch)
        seconds = self._seconds(choice.option, size, now)
        self.batches.append(Batch(now, seconds, choice.option, size))
        now += seconds
        self._take_in(now)
        self._line.finished(choice.option, size, seconds, now)
        for entry in choice.batch:
            if now <= entry.deadline_at + ROUNDING_S:
                self._end((entry,), now, "in_time", choice.option)
            else:
                self._line.answered_late(now)
                self._end((entry,), now, "late", choice.option)
        return now

    def _seconds(self, option: int, size: int, now: float) -> float:
        machine = self._machine
        seconds = machine.menu.options[option].seconds[size - 1] * machine.slowdown.factor(now) + machine.overhead_s
        return seconds * (1 + machine.noise * abs(self._rng.standard_normal()))

    def _end(self, entries: Iterable[Entry], now: float, outcome: Outcome, option: int | None = None) -> None:
        self.fates.extend(Fate(self._arrived.pop(entry), now, outcome, option) for entry in entries)


def replay(arrivals: Sequence[Arrival], machine: Machine, policy: str) -> Replay:
    """Replay arrivals with a fresh policy of that name, and early refusal if that is how the server would run it.

    Raises:
        BudgetTooSmallError: no sub-network is as cheap as a request wants it.
        InvalidParameterError: there is no such policy.
    """
    chooser = make_policy(policy, machine.menu, machine.max_batch_size)
    return Replay(arrivals, machine, chooser, early=refuses_early(policy))


@dataclass(frozen=True, slots=True)
class Figures:
    """How it went, over all machines.

    Attributes:
        outcomes: how many requests ended in which way, as in `Fate`.
        slo_attainment: share of all requests answered by their deadline.
        mean_accuracy: expected top-1 of the answers in time; None where nobody measured it, or nothing was in time.
        effective_accuracy: the same over all requests: those without an answer in time count 0.
        latency_ms: of all answers, by percentile; None without any.
        mean_batch_size: requests per batch; None without any.
        utilization: share of the time in which the engines were busy.
        changes_per_s: how often a machine ran another sub-network than in the batch before.
        mix: share of the answers by sub-network, the largest first.
    """

    outcomes: dict[str, int]
    slo_attainment: float
    mean_accuracy: float | None
    effective_accuracy: float | None
    latency_ms: dict[str, float | None]
    mean_batch_size: float | None
    utilization: float
    changes_per_s: float
    mix: dict[str, float]

    @classmethod
    def of(cls, replays: Sequence[Replay], menu: Menu) -> "Figures":
        """Sum up what happened on the machines, at least one request in all."""
        fates = [fate for one in replays for fate in one.fates]
        batches = [batch for one in replays for batch in one.batches]
        outcomes = Counter(fate.outcome for fate in fates)
        correct = sum(accuracy for _, _, accuracy in answers_in_time(fates, menu) if accuracy is not None)
        seconds = max(fate.ended_at for fate in fates) * len(replays) or math.inf
        latencies = [1000 * (fate.ended_at - fate.arrived_at) for fate in fates if fate.option is not None]
        changes = sum(before.option != after.option for one in replays for before, after in pairwise(one.batches))
        mix = Counter(grid_and_rate(menu.options[fate.option]) for fate in fates if fate.option is not None)
        return cls(
            outcomes={outcome: outcomes[outcome] for outcome in get_args(Outcome)},
            slo_attainment=outcomes["in_time"] / len(fates),
            mean_accuracy=correct / outcomes["in_time"] if menu.is_measured and outcomes["in_time"] else None,
            effective_accuracy=correct / len(fates) if menu.is_measured else None,
            latency_ms={f"p{n}": float(np.percentile(latencies, n)) if latencies else None for n in PERCENTILES},
            mean_batch_size=len(latencies) / len(batches) if batches else None,
            utilization=sum(batch.seconds for batch in batches) / seconds,
            changes_per_s=changes / seconds,
            mix={name: count / len(latencies) for name, count in mix.most_common()},
        )


def answers_in_time(fates: Iterable[Fate], menu: Menu) -> list[tuple[float, str | None, float | None]]:
    """List when each request arrived, which sub-network answered it in time if one did, and its expected top-1."""
    answers: list[tuple[float, str | None, float | None]] = []
    for fate in fates:
        option = menu.options[fate.option] if fate.outcome == "in_time" and fate.option is not None else None
        row = (grid_and_rate(option), option.row.top1) if option else (None, None)
        answers.append((fate.arrived_at, *row))
    return answers


def grid_and_rate(option: Option) -> str:
    """Name an option briefly, e.g. 14-0.5."""
    return fixed_name(option.row.subnetwork).removeprefix("fixed-")


def throughput(option: Option, max_batch_size: int) -> float:
    """Return the most requests per second that an option answers, in batches of whichever size is best for it."""
    return max(size / seconds for size, seconds in enumerate(option.seconds[:max_batch_size], start=1))
