"""Arrivals replayed in virtual time by the very scheduler and policy that serve, and the figures of how that went.

Decoding, the network and the ceiling on utilization are left out.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from service.errors import OverloadedError
from service.scheduling.catalog import Variant, VariantCatalog
from service.scheduling.policies import Policy, find_policy, fixed_name
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import QueuedRequest, RequestConstraints
from service.simulation.arrivals import Arrival, SlowdownScript

AS_PROFILED = SlowdownScript()
ROUNDING_S = 1e-9
PERCENTILES = (50, 95, 99)

Outcome = Literal["in_time", "overdue", "rejected", "expired", "shed"]


class Fate(NamedTuple):
    """What became of a request: answered in time or overdue, rejected at admission, expired, or shed by the policy.

    Attributes:
        arrived_at, ended_at: in seconds from the start.
        outcome: "expired" could no longer be answered in time, "shed" would have kept others from it.
        variant: that answered.
    """

    arrived_at: float
    ended_at: float
    outcome: Outcome
    variant: Variant | None = None


class Batch(NamedTuple):
    """A batch that ran: when it started, how long it took, and how many requests of which variant."""

    started_at: float
    seconds: float
    variant: Variant
    size: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Where requests are replayed.

    Attributes:
        catalog: its variants with the latencies that the server knows.
        max_batch_size: most that run together.
        slowdown: how much longer batches take than the server knows.
        overhead_s: what each batch takes on top, which the server does not know either.
        noise: how irregular batches are: each takes longer by the absolute value of a normal draw times this.
        seed: of the noise.
    """

    catalog: VariantCatalog
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

    def __init__(self, arrivals: Sequence[Arrival], machine: Machine, policy: Policy) -> None:
        """Replay arrivals, which ascend, with a fresh policy, until each request has an answer or an error.

        Raises:
            BudgetTooSmallError: no sub-network is as cheap as a request wants it.
        """
        self.fates: list[Fate] = []
        self.batches: list[Batch] = []
        self._machine = machine
        decide = policy.make(machine.catalog, machine.max_batch_size)
        self._scheduler = Scheduler(machine.catalog, decide, machine.max_batch_size, rejects_early=policy.rejects_early)
        self._rng = np.random.default_rng(machine.seed)
        self._arrived: dict[QueuedRequest, float] = {}
        self._coming = list(reversed(arrivals))
        now = 0.0
        while self._coming or len(self._scheduler):
            if not len(self._scheduler):
                now = max(now, self._coming[-1].at)
            self._take_in(now)
            if len(self._scheduler):
                now = self._serve(now)

    def _take_in(self, until: float) -> None:
        while self._coming and self._coming[-1].at <= until:
            arrival = self._coming.pop()
            highest_level, over_limit = self._machine.catalog.best_within(arrival.budget_gflops)
            constraints = RequestConstraints(arrival.budget_s, highest_level, over_limit=over_limit)
            request = QueuedRequest(arrival.at + arrival.budget_s, constraints, arrival.priority)
            self._arrived[request] = arrival.at
            try:
                self._scheduler.admit(request, arrival.at)
            except OverloadedError:
                self._end((request,), arrival.at, "rejected")
            else:
                self._scheduler.enqueue(request)

    def _serve(self, now: float) -> float:
        """Do what the policy chooses, and return when the engine is free again."""
        decision = self._scheduler.next_batch(now)
        self._end(decision.expired, now, "expired")
        self._end(decision.shed, now, "shed")
        if decision.variant is None:
            if not decision.removed:
                raise RuntimeError("the policy neither serves nor drops a request")
            return now
        size = len(decision.batch)
        seconds = self._seconds(decision.variant, size, now)
        self.batches.append(Batch(now, seconds, decision.variant, size))
        now += seconds
        self._take_in(now)
        self._scheduler.batch_completed(decision.variant, size, seconds, now)
        for request in decision.batch:
            if now <= request.deadline_at + ROUNDING_S:
                self._end((request,), now, "in_time", decision.variant)
            else:
                self._scheduler.deadline_missed(now)
                self._end((request,), now, "overdue", decision.variant)
        return now

    def _seconds(self, variant: Variant, size: int, now: float) -> float:
        machine = self._machine
        seconds = variant.latency_by_batch_s[size - 1] * machine.slowdown.factor(now) + machine.overhead_s
        return seconds * (1 + machine.noise * abs(self._rng.standard_normal()))

    def _end(
        self, requests: Iterable[QueuedRequest], now: float, outcome: Outcome, variant: Variant | None = None
    ) -> None:
        self.fates.extend(Fate(self._arrived.pop(request), now, outcome, variant) for request in requests)


def replay(arrivals: Sequence[Arrival], machine: Machine, policy: str) -> Replay:
    """Replay arrivals with a policy of that name.

    Raises:
        BudgetTooSmallError: no sub-network is as cheap as a request wants it.
        InvalidParameterError: there is no such policy.
    """
    return Replay(arrivals, machine, find_policy(policy, machine.catalog))


@dataclass(frozen=True, slots=True)
class Figures:
    """How it went, over all machines.

    Attributes:
        outcomes: how many requests ended in which way, as in `Fate`.
        slo_attainment: share of all requests answered by their deadline.
        mean_accuracy: expected top-1 of the answers in time; None where it was not measured, or nothing was in time.
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
    def of(cls, replays: Sequence[Replay], catalog: VariantCatalog) -> "Figures":
        """Sum up what happened on the machines, at least one request in all."""
        fates = [fate for one in replays for fate in one.fates]
        batches = [batch for one in replays for batch in one.batches]
        outcomes = Counter(fate.outcome for fate in fates)
        correct = sum(accuracy for _, _, accuracy in answers_in_time(fates) if accuracy is not None)
        seconds = max(fate.ended_at for fate in fates) * len(replays) or math.inf
        latencies = [1000 * (fate.ended_at - fate.arrived_at) for fate in fates if fate.variant is not None]
        changes = sum(before.variant != after.variant for one in replays for before, after in pairwise(one.batches))
        mix = Counter(grid_and_rate(fate.variant) for fate in fates if fate.variant is not None)
        return cls(
            outcomes={outcome: outcomes[outcome] for outcome in get_args(Outcome)},
            slo_attainment=outcomes["in_time"] / len(fates),
            mean_accuracy=correct / outcomes["in_time"] if catalog.is_measured and outcomes["in_time"] else None,
            effective_accuracy=correct / len(fates) if catalog.is_measured else None,
            latency_ms={f"p{n}": float(np.percentile(latencies, n)) if latencies else None for n in PERCENTILES},
            mean_batch_size=len(latencies) / len(batches) if batches else None,
            utilization=sum(batch.seconds for batch in batches) / seconds,
            changes_per_s=changes / seconds,
            mix={name: count / len(latencies) for name, count in mix.most_common()},
        )


def answers_in_time(fates: Iterable[Fate]) -> list[tuple[float, str | None, float | None]]:
    """List when each request arrived, which sub-network answered it in time if one did, and its expected top-1."""
    answers: list[tuple[float, str | None, float | None]] = []
    for fate in fates:
        variant = fate.variant if fate.outcome == "in_time" else None
        answered_by = (grid_and_rate(variant), variant.profile.top1) if variant else (None, None)
        answers.append((fate.arrived_at, *answered_by))
    return answers


def grid_and_rate(variant: Variant) -> str:
    """Name a variant briefly, e.g. 14-0.5."""
    return fixed_name(variant.profile.subnetwork).removeprefix("fixed-")


def throughput(variant: Variant, max_batch_size: int) -> float:
    """Return the most requests per second that a variant answers, in batches of whichever size is best for it."""
    return max(size / seconds for size, seconds in enumerate(variant.latency_by_batch_s[:max_batch_size], start=1))
