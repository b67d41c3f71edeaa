"""The choice of a sub-network and a batch, as a pure function of the line, the machine's state and the profile.

The idea: find the highest level at which everything that waits, and what will probably arrive in the next moment, can
still be answered in time when served in order of deadline with the largest batches that fit; run the first batch of
that plan. If even the cheapest level cannot do it, serve there, and give up as few requests as possible, those that
would be late anyway and would take others with them.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, cycle, islice
from operator import attrgetter, itemgetter

from service import reasons
from service.menu import Rows
from service.situation import Choice, Entry, Situation, Wish, target

FORECAST_S = 0.25
# These bound the time of a decision, to under a millisecond however many wait.
MAX_EXPECTED = 96
MAX_PLANNED = 128  # the most urgent, where each must be looked at; the others' turn comes
SAFETY = 1.05
TIGHT_SHARE = 0.8  # of a tight budget: a batch that takes longer has no place for those who granted it
BUSY = 0.3  # arrivals per longest single inference from which on a newcomer is to be reckoned with


def choose_level(situation: Situation) -> Choice:
    """Choose the highest level that clears the line, and its first batch."""
    late = _hopeless(situation)
    gone = set(late)
    line = [entry for entry in situation.line if entry not in gone] if gone else list(situation.line)
    if not line:
        return Choice(None, late=late)
    careful = replace(situation, slowdown=situation.slowdown * situation.caution)
    # With a guard, batches would be too small to carry what comes.
    plan = _Plan(careful, line, math.inf if _is_outrun(situation, situation.arrival_rate) else _guard_s(careful))
    outrun = _is_outrun(situation, min(situation.arrival_rate, situation.lasting_rate))
    # Time that a better level took now would be missed sooner or later.
    highest = 0 if outrun else situation.menu.num_levels - 1
    level = plan.highest_clearing(highest)
    if level is not None:
        choice = _first_batch(plan, level, late)
        return replace(choice, reason=reasons.outrun(situation, len(line))) if outrun else choice
    shed = _to_shed(replace(situation, caution=1.0), line)  # nobody is given up for what is only possible
    given_up = set(shed)
    return _cheapest_batch(careful, [entry for entry in line if entry not in given_up], late, shed)


class _Plan:
    """Whether a level clears what waits and what is expected; built once per decision, asked once per bisection."""

    def __init__(self, situation: Situation, line: Sequence[Entry], guard_s: float) -> None:
        self.situation = situation
        self.prudent = replace(situation, slowdown=situation.slowdown * situation.prudence)
        self.line = line
        self.guard_s = guard_s
        self.coming = _expected(situation)
        wishes = [entry.wish for entry in line]
        wishes += [wish for _, wish in self.coming]
        self.lowest_limit = min([wish.limit if wish.only is None else -1 for wish in wishes])
        self.deadlines = [entry.deadline_at for entry in line]
        self.deadlines += [deadline for deadline, _ in self.coming]
        self.deadlines.sort()

    @cached_property
    def first_wishes(self) -> list[Wish]:
        """Of the MAX_PLANNED that are due first."""
        first = [(entry.deadline_at, entry.wish) for entry in self.line[:MAX_PLANNED]] + self.coming
        first.sort(key=itemgetter(0))
        return [wish for _, wish in first[:MAX_PLANNED]]

    def highest_clearing(self, highest: int) -> int | None:
        """Bisect the levels up to the highest; None if even the cheapest leaves somebody late."""
        low, high = -1, highest
        while low < high:
            middle = (low + high + 1) // 2
            if self.clears(middle):
                low = middle
            else:
                high = middle - 1
        return low if low >= 0 else None

    def clears(self, level: int) -> bool:
        situation = self.prudent if level else self.situation  # prudence gives up accuracy, never a request
        if level <= self.lowest_limit:
            return clears(situation, self.deadlines, level, self.batch_limit(level))
        targets = [target(wish, level) for wish in self.first_wishes]
        return _clears_mixed(situation, self.deadlines, targets, self.guard_s)

    def share(self, level: int, option: int) -> int:
        """The largest batch of `option` that leaves the other options in the plan's first group their time."""
        situation, row = self.situation, self.situation.rows[option]
        targets = [target(wish, level) for wish in self.first_wishes[: situation.max_batch_size]]
        room = min(self.deadlines[0] - situation.now, max(self.guard_s, row[0] * situation.slowdown))
        room /= situation.slowdown
        sizes, cost = _group(situation.rows, targets, room)
        own_s = row[sizes[option] - 1] if sizes[option] else 0.0
        return max(sizes[option], bisect_right(row, room - cost + own_s))

    def batch_limit(self, option: int) -> int:
        """The largest batch that a tight newcomer can wait for; at least one."""
        return max(1, self.situation.fitting(option, self.guard_s, self.situation.max_batch_size))


def clears(situation: Situation, deadlines: Sequence[float], option: int, max_size: int) -> bool:
    """Whether serving all of `deadlines`, ascending, with one option in the largest batches is in time for all.

    The slowdown is the one that few batches exceed. That many in a row do is less likely still: their time adds up as
    it probably will be, and their deviations, independent of each other, as the root of the sum of squares.
    """
    row, slowdown, time = situation.rows[option], situation.slowdown, situation.now
    likely = slowdown / situation.caution
    busy, spread, squares, margin = likely * situation.stretch, slowdown - likely, 0.0, 0.0
    index, count = 0, len(deadlines)
    while index < count:
        size = bisect_right(row, (deadlines[index] - time - margin) / slowdown, 0, max_size)
        if size == 0:
            return False
        if size > count - index:
            size = count - index
        seconds = row[size - 1]
        time += seconds * busy
        squares += (seconds * spread) ** 2
        margin = math.sqrt(squares)
        index += size
    return True


def _clears_mixed(situation: Situation, deadlines: Sequence[float], targets: Sequence[int], guard_s: float) -> bool:
    """As `clears`, where each request has a target of its own: a group pays for one batch per target in it.

    Those beyond the targets are taken to go at the pace of those before them.
    """
    rows, slowdown, max_size = situation.rows, situation.slowdown, situation.max_batch_size
    likely = slowdown / situation.caution
    busy, spread, squares, margin = likely * situation.stretch, slowdown - likely, 0.0, 0.0
    index, count, time = 0, len(targets), situation.now
    while index < count:
        room = min(deadlines[index] - time - margin, max(guard_s, rows[targets[index]][0] * slowdown)) / slowdown
        sizes, cost = _group(rows, targets[index : index + max_size], room)
        if not cost:
            return False
        time += cost * busy
        squares += (cost * spread) ** 2
        margin = math.sqrt(squares)
        index += sum(sizes)
    pace = (time - situation.now) / count
    return all(time + pace * (index - count) <= deadlines[index] for index in range(count, len(deadlines), max_size))


def _group(rows: Rows, targets: Sequence[int], room: float) -> tuple[list[int], float]:
    """Take from the front what fits the room: how many of each option, and the cost of a batch of each."""
    sizes, cost = [0] * len(rows), 0.0
    for option in targets:
        row, size = rows[option], sizes[option]
        more = row[size] - row[size - 1] if size else row[0]
        if cost + more > room:
            break
        sizes[option] = size + 1
        cost += more
    return sizes, cost


def _hopeless(situation: Situation) -> tuple[Entry, ...]:
    """Those whose deadline not even a batch of one at their cheapest option would meet."""
    ends = [situation.now + row[0] * situation.slowdown for row in situation.rows]
    latest = max(ends)
    hopeless = []
    for entry in situation.line:
        if entry.deadline_at >= latest:
            break
        if entry.deadline_at < ends[entry.wish.only or 0]:
            hopeless.append(entry)
    return tuple(hopeless)


def _expected(situation: Situation) -> list[tuple[float, Wish]]:
    """The arrivals of the next moment, with some more for chance, evenly spaced, each with the wish of a recent one."""
    mean = situation.arrival_rate * FORECAST_S
    crowd = mean + math.sqrt(mean)  # a Poisson deviation more: where few come, chance brings twice as many
    count, now, rate = min(round(crowd), MAX_EXPECTED), situation.now, crowd / FORECAST_S
    wishes = islice(cycle(situation.recent), count)
    return [(now + index / rate + wish.budget_s, wish) for index, wish in enumerate(wishes, start=1)]


def _guard_s(situation: Situation) -> float:
    """The longest batch after which those who come meanwhile can still be answered, however tight their budgets.

    Infinite where nobody is due, or where not even one of them could be.
    """
    rate, most, tight_s = situation.arrival_rate, situation.max_batch_size, situation.tight_budget_s

    def room(count: int) -> float:
        return tight_s - situation.seconds(0, count)

    if room(1) <= 0 or rate * situation.seconds(situation.menu.num_levels - 1, 1) <= BUSY:
        return math.inf
    # The longer the batch, the more of them come, and the less room they leave it.
    enough = bisect_left(range(1, most + 1), True, key=lambda count: count / rate >= room(count))
    if enough < most:
        return max(enough / rate, room(enough + 1))
    return max(most / rate, tight_s / (1 + rate * situation.seconds(0, most) / most))  # more than a batch of them


def _first_batch(plan: _Plan, level: int, late: tuple[Entry, ...]) -> Choice:
    """Take the first batch of the plan, with a little safety: a choice that only just fits is lowered."""
    situation, line, head = plan.situation, plan.line, plan.line[0]
    room = head.deadline_at - situation.now
    tight = min(room, plan.guard_s)
    option = target(head.wish, level)
    if plan.lowest_limit >= level:
        together, size = line, plan.batch_limit(option)
    else:
        together = [entry for entry in line[:MAX_PLANNED] if target(entry.wish, level) == option]
        size = min(plan.share(level, option), plan.batch_limit(option))
    size = max(1, min(situation.fitting(option, room, len(together)), size))
    lower = option if option < situation.menu.num_levels else head.wish.limit + 1
    while head.wish.only is None and lower > 0 and situation.seconds(option, size) * SAFETY > tight:
        option = lower = lower - 1
    while size > 1 and situation.seconds(option, size) * SAFETY > tight:
        size -= 1
    granting = (entry for entry in together if target(entry.wish, option) == option)  # not all, if it was lowered
    reason = reasons.cleared(situation, line, bool(plan.coming), option)
    return Choice(option, tuple(islice(granting, size)), late, reason=reason)


def _to_shed(situation: Situation, line: Sequence[Entry]) -> tuple[Entry, ...]:
    """Choose whom to give up so that the cheapest level answers the rest: low priority first, then the most urgent.

    Whoever of these is due so late that nobody gains from it stays.
    """
    order = sorted(line[:MAX_PLANNED], key=attrgetter("priority"))  # stable: by deadline within each priority
    if _is_outrun(situation, situation.arrival_rate):
        count = _too_urgent(situation, [entry.deadline_at for entry in order])
        latest = max(entry.deadline_at for entry in order[count:])  # whoever is due after them takes nobody's place
        return tuple(entry for entry in order[:count] if entry.deadline_at <= latest)

    def is_answered(rest: Sequence[Entry]) -> bool:
        return _clears_cheapest(situation, sorted(rest, key=attrgetter("deadline_at")))

    # A passing burst: as few as possible.
    fewest = bisect_left(range(len(order) - 1), True, key=lambda count: is_answered(order[count:]))
    if order[0].priority == order[-1].priority:
        return tuple(order[:fewest])
    shed, kept = sorted(order[:fewest], key=attrgetter("deadline_at")), order[fewest:]
    return tuple(shed[: bisect_left(range(len(shed)), True, key=lambda count: is_answered(shed[count:] + kept))])


def _clears_cheapest(situation: Situation, line: Sequence[Entry]) -> bool:
    """Whether the cheapest option of each answers all of `line`, which is in order of deadline."""
    deadlines, options = [entry.deadline_at for entry in line], [entry.wish.only or 0 for entry in line]
    if any(options):
        return _clears_mixed(situation, deadlines, options, math.inf)
    return clears(situation, deadlines, 0, situation.max_batch_size)


def _is_outrun(situation: Situation, rate: float) -> bool:
    """Whether more would arrive at this rate than even the cheapest level carries in full batches."""
    full_s = situation.seconds(0, situation.max_batch_size) * situation.stretch
    return rate * full_s > situation.max_batch_size


def _too_urgent(situation: Situation, deadlines: Sequence[float]) -> int:
    """Arrivals outrun even the cheapest level: count those that keep this batch from being as large as is useful.

    Small batches would waste the very capacity that is short.

    Args:
        situation: the moment.
        deadlines: in the order in which requests are given up.
    """
    earliest = list(accumulate(reversed(deadlines), min))[::-1]  # of those left, once so many are given up
    largest = situation.fitting(0, TIGHT_SHARE * situation.tight_budget_s, len(deadlines))
    if largest < 2:  # budgets that leave no room for two say nothing of what is useful
        largest = min(situation.max_batch_size, len(deadlines))
    for size in range(largest, 1, -1):
        count = bisect_left(earliest, situation.now + situation.seconds(0, size))
        if count + size <= len(deadlines):
            return count
    return 0


def _cheapest_batch(
    situation: Situation, line: Sequence[Entry], late: tuple[Entry, ...], shed: tuple[Entry, ...]
) -> Choice:
    option = line[0].wish.only or 0
    together = [entry for entry in line[:MAX_PLANNED] if (entry.wish.only or 0) == option]
    size = max(1, situation.fitting(option, line[0].deadline_at - situation.now, len(together)))
    reason = reasons.overloaded(situation.menu, len(line) + len(shed), option)
    return Choice(option, tuple(together[:size]), late, shed, reason)
