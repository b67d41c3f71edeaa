"""Replays arrivals in virtual time with the scheduler and policy of the server, and computes figures of the outcome.

Decoding, the network and the utilization ceiling are left out.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from service.domain import LookCode
from service.errors import OverloadedError
from service.scheduling.catalog import VariantCatalog
from service.scheduling.policies import Policy, find_policy, variant_name
from service.scheduling.scheduler import Scheduler
from service.scheduling.second_look import Looked
from service.scheduling.state import QueuedRequest, RequestConstraints
from service.scheduling.variants import Variant
from service.simulation.arrivals import Arrival, SlowdownScript

AS_PROFILED = SlowdownScript()
ROUNDING_S = 1e-9
PERCENTILES = (50, 95, 99)

Outcome = Literal["in_time", "overdue", "rejected", "expired", "shed"]


class RequestOutcome(NamedTuple):
    """The outcome of a request: answered in time or overdue, rejected at admission, expired, or shed by the policy.

    Attributes:
        arrived_at, ended_at: in seconds from the start.
        outcome: "expired" could no longer be answered in time, "shed" would have made others late.
        variant: the variant that answered; None without an answer.
        top1: expected accuracy of the answer; None where unmeasured, or without an answer.
        looks: number of looks at the image.
    """

    arrived_at: float
    ended_at: float
    outcome: Outcome
    variant: Variant | None = None
    top1: float | None = None
    looks: int = 0


class _Waiting(NamedTuple):
    """A request that has not ended: when it arrived, how hard its image is, and which variant has looked at it already.

    An image is harder than the fraction `difficulty` of all images. Where that is at least the share of images of which
    a first look is sure, the image needs another look.
    """

    arrived_at: float
    difficulty: float
    answered_by: Variant | None = None


class Batch(NamedTuple):
    """A batch that ran: when it started, how long it took, and how many requests of which variant."""

    started_at: float
    seconds: float
    variant: Variant
    size: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine on which requests are replayed.

    Attributes:
        catalog: its variants with the latencies that the scheduler knows.
        max_batch_size: most requests that run together.
        slowdown: how much longer batches take than the scheduler knows.
        overhead_s: time that each batch takes on top, which the scheduler does not know either.
        noise: how irregular batches are: each takes longer by the absolute value of a normal draw times this.
        seed: seed of the noise and of the difficulty of images.
    """

    catalog: VariantCatalog
    max_batch_size: int = 16
    slowdown: SlowdownScript = AS_PROFILED
    overhead_s: float = 0.0
    noise: float = 0.0
    seed: int = 0


class Replay:
    """A replay on one machine: whenever its engine is free, the policy decides; requests arrive while batches run.

    Attributes:
        request_outcomes: outcomes of the requests, in the order in which they ended.
        batches: batches in the order in which they ran.
    """

    def __init__(self, arrivals: Sequence[Arrival], machine: Machine, policy: Policy) -> None:
        """Replay arrivals, in ascending order, with a fresh policy until each request has an answer or an error.

        Raises:
            BudgetTooSmallError: no sub-network fits the budget of a request.
        """
        self.request_outcomes: list[RequestOutcome] = []
        self.batches: list[Batch] = []
        self._machine = machine
        decide = policy.make(machine.catalog, machine.max_batch_size)
        self._scheduler = Scheduler(machine.catalog, decide, machine.max_batch_size, rejects_early=policy.rejects_early)
        self._rng = np.random.default_rng(machine.seed)
        self._difficulties = np.random.default_rng([machine.seed, 1])
        self._waiting: dict[QueuedRequest, _Waiting] = {}
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
            grant = self._machine.catalog.grant_within(arrival.budget_gflops)
            max_gflops = math.inf if arrival.budget_gflops is None else arrival.budget_gflops
            constraints = RequestConstraints(arrival.budget_s, grant, max_gflops)
            request = QueuedRequest(arrival.at + arrival.budget_s, constraints, arrival.priority)
            self._waiting[request] = _Waiting(arrival.at, self._difficulties.random())
            try:
                self._scheduler.admit(request, arrival.at)
            except OverloadedError:
                self._end(request, arrival.at, "rejected")
            else:
                self._scheduler.enqueue(request)

    def _serve(self, now: float) -> float:
        """Carry out the decision of the policy, and return when the engine is free again."""
        decision = self._scheduler.next_batch(now)
        for request in decision.expired:
            self._end_without(request, now, "expired")
        for request in decision.shed:
            self._end_without(request, now, "shed")
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
        looked = [self._looked(request, decision.variant) for request in decision.batch]
        for one, following in zip(looked, self._scheduler.look_again(looked, decision.variant, now), strict=True):
            if isinstance(following, LookCode):
                self._answer(one.request, decision.variant, now, is_complete=following is LookCode.SURE)
            else:
                waiting = self._waiting[one.request.admitted]
                self._waiting[one.request.admitted] = waiting._replace(answered_by=decision.variant)
        return now

    def _looked(self, request: QueuedRequest, variant: Variant) -> Looked:
        """Return a look that is fully sure, or not sure at all where the image is one of those that need another."""
        waiting, second = self._waiting[request.admitted], variant.second_look
        is_unsure = second is not None and waiting.difficulty >= 1 - second.share
        before = 0 if waiting.answered_by is None else waiting.answered_by.profile.macs
        return Looked(request, 0.0 if is_unsure else 1.0, before + variant.profile.macs)

    def _answer(self, request: QueuedRequest, variant: Variant, now: float, *, is_complete: bool) -> None:
        if now <= request.deadline_at + ROUNDING_S:
            first = self._waiting[request.admitted].answered_by
            looks, chosen = (1, variant) if first is None else (2, first)
            top1 = chosen.top1 if is_complete else chosen.top1_without_second_look
            self._end(request.admitted, now, "in_time", chosen, top1, looks)
        elif request.second_look_of is not None:
            self._end_without(request, now, "overdue")
        else:
            self._scheduler.deadline_missed(now)
            self._end(request, now, "overdue", variant, variant.top1, 1)

    def _end_without(self, request: QueuedRequest, now: float, outcome: Outcome) -> None:
        """End a request without an answer, or with that of its first look if it only waited for another."""
        first = self._waiting[request.admitted].answered_by
        if first is None:
            self._end(request, now, outcome)
        else:
            at = min(now, request.deadline_at)
            self._end(request.admitted, at, "in_time", first, first.top1_without_second_look, 1)

    def _seconds(self, variant: Variant, size: int, now: float) -> float:
        machine = self._machine
        alone = machine.catalog.variants[variant.first_index]
        seconds = alone.latency_by_batch_s[size - 1] * machine.slowdown.factor(now) + machine.overhead_s
        return seconds * (1 + machine.noise * abs(self._rng.standard_normal()))

    def _end(
        self,
        request: QueuedRequest,
        now: float,
        outcome: Outcome,
        variant: Variant | None = None,
        top1: float | None = None,
        looks: int = 0,
    ) -> None:
        self.request_outcomes.append(
            RequestOutcome(self._waiting.pop(request).arrived_at, now, outcome, variant, top1, looks)
        )


def replay(arrivals: Sequence[Arrival], machine: Machine, policy: str) -> Replay:
    """Replay arrivals with the policy of that name.

    Raises:
        BudgetTooSmallError: no sub-network fits the budget of a request.
        InvalidParameterError: there is no such policy.
    """
    return Replay(arrivals, machine, find_policy(policy, machine.catalog))


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a simulation, over all machines.

    Attributes:
        outcomes: number of requests by outcome, as in `RequestOutcome`.
        slo_attainment: share of all requests answered by their deadline.
        mean_accuracy: expected top-1 of the answers in time; None where it was not measured, or nothing was in time.
        effective_accuracy: the same over all requests: those without an answer in time count 0.
        latency_ms: latency of all answers, by percentile; None without answers.
        mean_batch_size: requests per batch; None without batches.
        utilization: fraction of the time in which the engines were busy.
        changes_per_s: how often per second a machine ran another variant than in the batch before.
        looked_again: share of the answers that took two looks.
        mix: share of the answers by variant, the largest first.
    """

    outcomes: dict[str, int]
    slo_attainment: float
    mean_accuracy: float | None
    effective_accuracy: float | None
    latency_ms: dict[str, float | None]
    mean_batch_size: float | None
    utilization: float
    changes_per_s: float
    looked_again: float
    mix: dict[str, float]

    @classmethod
    def of(cls, replays: Sequence[Replay], catalog: VariantCatalog) -> "Figures":
        """Compute the figures of the replays on all machines, which have at least one request in all."""
        request_outcomes = [each for one in replays for each in one.request_outcomes]
        batches = [batch for one in replays for batch in one.batches]
        outcomes = Counter(each.outcome for each in request_outcomes)
        correct = sum(each.top1 for each in request_outcomes if each.outcome == "in_time" and each.top1 is not None)
        seconds = max(each.ended_at for each in request_outcomes) * len(replays) or math.inf
        latencies = [1000 * (each.ended_at - each.arrived_at) for each in request_outcomes if each.variant is not None]
        changes = sum(before.variant != after.variant for one in replays for before, after in pairwise(one.batches))
        mix = Counter(variant_name(each.variant) for each in request_outcomes if each.variant is not None)
        return cls(
            outcomes={outcome: outcomes[outcome] for outcome in get_args(Outcome)},
            slo_attainment=outcomes["in_time"] / len(request_outcomes),
            mean_accuracy=correct / outcomes["in_time"] if catalog.is_measured and outcomes["in_time"] else None,
            effective_accuracy=correct / len(request_outcomes) if catalog.is_measured else None,
            latency_ms={f"p{n}": float(np.percentile(latencies, n)) if latencies else None for n in PERCENTILES},
            mean_batch_size=sum(batch.size for batch in batches) / len(batches) if batches else None,
            utilization=sum(batch.seconds for batch in batches) / seconds,
            changes_per_s=changes / seconds,
            looked_again=sum(each.looks > 1 for each in request_outcomes) / max(1, len(latencies)),
            mix={name: count / len(latencies) for name, count in mix.most_common()},
        )


def answers_in_time(request_outcomes: Iterable[RequestOutcome]) -> list[tuple[float, str | None, float | None]]:
    """List when each request arrived, which variant answered it in time, if any, and the expected top-1."""
    answers: list[tuple[float, str | None, float | None]] = []
    for each in request_outcomes:
        variant = each.variant if each.outcome == "in_time" else None
        answered_by = (variant_name(variant), each.top1) if variant else (None, None)
        answers.append((each.arrived_at, *answered_by))
    return answers


def throughput(variant: Variant, max_batch_size: int) -> float:
    """Return the most requests per second that a variant answers, at its best batch size."""
    return max(size / seconds for size, seconds in enumerate(variant.latency_by_batch_s[:max_batch_size], start=1))
