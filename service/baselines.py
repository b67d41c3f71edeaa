"""Published and simple policies behind the signature of `service.policy.choose_level`, to be served and compared with.

What a published policy does not know it ignores here as well: the slowdown, the corrected latencies, the forecast. What
a request grants, its limit of cost or its sub-network by name, binds every one of them.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

from models.subnetwork import SubNetwork
from service.errors import InvalidParameterError
from service.menu import Menu, Rows
from service.policy import choose_level
from service.situation import Choice, Entry, Policy, Situation, Wish, target

NUM_BUCKETS = 32
PLAN_PERIOD_S = 5.0
PLAN_HEADROOM = 1.05
WAITING_PER_STEP = 2
MAX_LOOKED = 256  # bounds the time of a decision


# Given the situation, the seconds left to the most urgent and how many wait: the option, and the most to run together.
Pick = Callable[[Situation, float, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Baseline:
    """A policy that looks at the head of the line: who can no longer be answered is dropped, the most urgent run first.

    Attributes:
        name: for the reasons that it gives.
        pick: the rule by which it differs from the others; sees latencies as profiled unless `estimates`.
        lowest: the option that it would run in the worst case; who cannot be answered even with it is dropped.
        drops_early: whether those are shed who would make the batch small, as in Nexus (Shen et al., SOSP 2019).
        estimates: whether it uses the slowdown and the corrected latencies.
    """

    name: str
    pick: Pick
    lowest: int = 0
    drops_early: bool = False
    estimates: bool = False

    def __call__(self, situation: Situation) -> Choice:
        """Choose an option and the largest batch of it that ends before the head's deadline."""
        menu = situation.menu
        seen = situation if self.estimates else replace(situation, rows=profiled_rows(menu), slowdown=1.0)
        late = self._late(seen)
        gone = set(late)
        line = [entry for entry in situation.line if entry not in gone] if gone else situation.line
        if not line:
            return Choice(None, late=late, reason=f"{self.name}: nobody who waits can be answered in time")
        shed = tuple(line[: _first_worth(seen, line, self.lowest)]) if self.drops_early else ()
        line = line[len(shed) :]
        head = line[0]
        room_s = head.deadline_at - situation.now
        wanted, most = self.pick(seen, room_s, len(line))
        option = granted(menu, head.wish, wanted)
        size = max(1, min(most, seen.fitting(option, room_s, len(line))))
        together = (entry for entry in line if granted(menu, entry.wish, wanted) == option)
        reason = f"{self.name}: {menu.options[option].row.subnetwork}, {1000 * room_s:.0f} ms left to the most urgent"
        return Choice(option, tuple(islice(together, size)), late, shed, reason)

    def _late(self, seen: Situation) -> tuple[Entry, ...]:
        own_s = [row[0] * seen.slowdown for row in seen.rows]
        latest = seen.now + max(own_s)
        urgent = takewhile(lambda entry: entry.deadline_at < latest, seen.line)
        lowest = ((entry, granted(seen.menu, entry.wish, self.lowest)) for entry in urgent)
        return tuple(entry for entry, option in lowest if entry.deadline_at < seen.now + own_s[option])


def _first_worth(seen: Situation, line: Sequence[Entry], wanted: int) -> int:
    """Find the first from whom on a batch of the planned size ends in time; that size takes half a latency budget."""
    counts: Counter[int] = Counter()
    first = min(len(line), MAX_LOOKED) - 1
    for index in range(first, -1, -1):
        option = granted(seen.menu, line[index].wish, wanted)
        counts[option] += 1
        planned = max(1, seen.fitting(option, seen.tight_budget_s / 2, counts[option]))
        if line[index].deadline_at >= seen.now + seen.seconds(option, planned):
            first = index
    return first


def profiled_rows(menu: Menu) -> Rows:
    """Return the latencies of the menu's options, in seconds, as they were measured."""
    return [option.seconds for option in menu.options]


def granted(menu: Menu, wish: Wish, wanted: int) -> int:
    """Return the option that a request gets from a policy that wants `wanted`, which need not be a level.

    One that costs more than the request surely admits becomes the best that it does: no policy ever exceeds a budget.
    """
    if wanted < menu.num_levels or wish.only is not None:
        return target(wish, wanted)
    most = target(wish, menu.num_levels)
    return wanted if menu.options[wanted].row.macs <= menu.options[most].row.macs else most


def largest_batch(rows: Rows, num_levels: int, room_s: float, most: int) -> tuple[int, int]:
    """Find the largest batch, at most `most`, that some level runs within the room; then the best level that does.

    Returns:
        Level and size; the cheapest level and 1 where nothing fits.
    """
    size = max(1, min(bisect_right(rows[0], room_s), most))
    fitting = [level for level in range(num_levels) if rows[level][size - 1] <= room_s]
    return (fitting[-1] if fitting else 0), size


def _max_accuracy(situation: Situation, room_s: float, _waiting: int) -> tuple[int, int]:
    """MaxAcc (Khare et al., NSDI 2025): first the most accurate that answers the head in time, then the batch."""
    fitting = [level for level in range(situation.menu.num_levels) if situation.seconds(level, 1) <= room_s]
    return (fitting[-1] if fitting else 0), situation.max_batch_size


def _max_batch(situation: Situation, room_s: float, waiting: int) -> tuple[int, int]:
    """MaxBatch (Khare et al., NSDI 2025): first the largest batch of those who wait, then the most accurate for it."""
    most = min(waiting, situation.max_batch_size)
    return largest_batch(situation.rows, situation.menu.num_levels, room_s, most)


def _step_down(situation: Situation, room_s: float, waiting: int) -> tuple[int, int]:
    """One level down from the best per two requests waiting, and further until their batch answers the head in time."""
    level = max(0, situation.menu.num_levels - 1 - waiting // WAITING_PER_STEP)
    size = min(waiting, situation.max_batch_size)
    while level > 0 and situation.seconds(level, size) > room_s:
        level -= 1
    return level, size


class _SlackFit:
    """SlackFit (Khare et al., SuperServe, NSDI 2025): the time left to the head stands for the load.

    Latencies from l(cheapest, 1) to l(best, largest batch) fall into even buckets; each offers the level and batch size
    of the largest batch under it, the most accurate of these. The bucket just under the head's time is taken.
    """

    def __init__(self, menu: Menu, max_batch_size: int, *, capped: bool = False) -> None:
        """Fill the buckets; `capped`, our addition, asks for no larger batch than there are requests waiting."""
        self._rows, self._num_levels, self._capped = profiled_rows(menu), menu.num_levels, capped
        self._lowest_s = self._rows[0][0]
        self._width_s = (menu.best.seconds[max_batch_size - 1] - self._lowest_s) / NUM_BUCKETS
        self._buckets = [self._fill(bucket, max_batch_size) for bucket in range(NUM_BUCKETS + 1)]

    def __call__(self, situation: Situation, room_s: float, waiting: int) -> tuple[int, int]:
        """Take the bucket under the head's time, which a slowdown shortens for the variant that estimates it."""
        above_s = room_s / situation.slowdown - self._lowest_s
        bucket = int(min(max(above_s / self._width_s, 0), NUM_BUCKETS)) if self._width_s > 0 else NUM_BUCKETS
        return self._fill(bucket, min(waiting, situation.max_batch_size)) if self._capped else self._buckets[bucket]

    def _fill(self, bucket: int, most: int) -> tuple[int, int]:
        return largest_batch(self._rows, self._num_levels, self._lowest_s + bucket * self._width_s, most)


class _PeriodicPlan:
    """After Proteus (Ahmad et al., ASPLOS 2024): a plan per period, batches adapted to deadlines in between.

    The plan is the most accurate level that carries the demand with batches of at most half the latency budget. With
    one machine and one model there is nothing to place, so no mixed-integer program; Proteus plans every 30 s.
    """

    def __init__(self) -> None:
        self._planned_at: float | None = None
        self._level = 0

    def __call__(self, situation: Situation, _room_s: float, _waiting: int) -> tuple[int, int]:
        """Follow the plan; make a new one when the period is over."""
        if self._planned_at is None or situation.now - self._planned_at >= PLAN_PERIOD_S:
            self._planned_at, self._level = situation.now, self._plan(situation)
        return self._level, situation.max_batch_size

    def _plan(self, situation: Situation) -> int:
        demand = PLAN_HEADROOM * situation.arrival_rate
        for level in range(situation.menu.num_levels - 1, 0, -1):
            size = max(1, situation.fitting(level, situation.tight_budget_s / 2, situation.max_batch_size))
            if size / situation.seconds(level, size) >= demand:
                return level
        return 0


def _fixed(menu: Menu, subnetwork: SubNetwork) -> Baseline:
    """One sub-network for all that grant it, in the largest batches that the deadlines admit, with early drop."""
    option = menu.index_of(subnetwork, None)

    def pick(situation: Situation, _room_s: float, _waiting: int) -> tuple[int, int]:
        return option, situation.max_batch_size

    return Baseline(fixed_name(subnetwork), pick, lowest=option, drops_early=True)


def _min_cost(situation: Situation, _room_s: float, _waiting: int) -> tuple[int, int]:
    """After INFaaS (Romero et al., USENIX ATC 2021): the cheapest variant that meets latency and accuracy asked for.

    Our requests ask for no accuracy, so the cheapest of all.
    """
    return 0, situation.max_batch_size


POLICIES: Mapping[str, Callable[[Menu, int], Policy]] = {
    "level": lambda _menu, _size: choose_level,
    "max-accuracy": lambda _menu, _size: Baseline("max-accuracy", _max_accuracy),
    "max-batch": lambda _menu, _size: Baseline("max-batch", _max_batch),
    "slackfit": lambda menu, size: Baseline("slackfit", _SlackFit(menu, size)),
    "slackfit-capped": lambda menu, size: Baseline("slackfit-capped", _SlackFit(menu, size, capped=True)),
    "slackfit-estimate": lambda menu, size: Baseline("slackfit-estimate", _SlackFit(menu, size), estimates=True),
    "infaas": lambda _menu, _size: Baseline("infaas", _min_cost),
    "proteus": lambda _menu, _size: Baseline("proteus", _PeriodicPlan()),
    "step-down": lambda _menu, _size: Baseline("step-down", _step_down, estimates=True),
    "step-down-drop": lambda _menu, _size: Baseline("step-down-drop", _step_down, drops_early=True, estimates=True),
}


def fixed_name(subnetwork: SubNetwork) -> str:
    """Name the policy that always runs `subnetwork`, e.g. fixed-14-0.5."""
    return f"fixed-{subnetwork.patch_grid}-{subnetwork.keep_rate:.10g}"


def policy_names(menu: Menu) -> tuple[str, ...]:
    """Name every policy for this menu; keep rates that nobody trained can be fixed as well."""
    fixed = sorted(option.row.subnetwork for option in menu.options if option.row.is_trained)
    return (*POLICIES, *map(fixed_name, fixed))


def make_policy(name: str, menu: Menu, max_batch_size: int) -> Policy:
    """Build a policy for a menu and for batches of at most so many; one that plans keeps its plan to itself.

    Raises:
        InvalidParameterError: there is no policy of that name; lists those there are.
    """
    if name in POLICIES:
        return POLICIES[name](menu, min(max_batch_size, menu.max_batch_size))
    for option in menu.options:
        if name == fixed_name(option.row.subnetwork):
            return _fixed(menu, option.row.subnetwork)
    message = f"{name} is no policy; there are {', '.join(policy_names(menu))}"
    raise InvalidParameterError(message, parameter="policy")


def refuses_early(name: str) -> bool:
    """Tell whether a line served by this policy refuses at admission; published ones drop when they choose."""
    return name == "level"
