"""The waiting line: who is in the server, what is known of the traffic and of the machine, and what to do next.

No clock, no waiting and no images here: the server and the simulator run the very same code. In the server the event
loop, the threads that decode and the engine's share it, so each public method takes its lock.
"""

import functools
import math
import threading
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Concatenate, ParamSpec, TypeVar

from service.errors import OverloadedError
from service.estimates import CAUTIOUS, ArrivalRate, Prudence, Slowdown
from service.menu import Menu
from service.situation import READY, Choice, Entry, Policy, Preparation, Situation, Wish, target

REMEMBERED_WISHES = 128
TIGHT_QUANTILE = 0.05
RATE_TIME_S = 0.5
LASTING_TIME_S = 2.0
LASTING_MARGIN = 0.3  # of a full batch; a whole one refuses every tight budget
TURNAROUND_GAIN = 0.1
MAX_TURNAROUND = 2.0
NO_TIME_S = 1e-6  # a coarse clock may see none go by
DRIFT_GAIN = 0.1
MAX_DRIFT = 0.2
MAX_PREVIEWED = 8  # decisions; a longer line is taken to go on as it began

_deadline = attrgetter("deadline_at")

P = ParamSpec("P")
R = TypeVar("R")


def _locked(method: "Callable[Concatenate[Line, P], R]") -> "Callable[Concatenate[Line, P], R]":
    @functools.wraps(method)
    def one_at_a_time(self: "Line", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return one_at_a_time


class Line:
    """Everyone who has been admitted and not yet been answered, in order of deadline."""

    def __init__(self, menu: Menu, policy: Policy, max_batch_size: int, *, refuses_early: bool = True) -> None:
        """Start empty.

        Args:
            menu: what can be run.
            policy: what chooses.
            max_batch_size: most that may run together; no more than the menu knows the latency of.
            refuses_early: whether `admit` refuses what it sees no way to answer in time.
        """
        self.menu = menu
        self.slowdown = Slowdown()
        self.prudence = Prudence()
        self.prior_slowdown = 1.0
        self.pause_stretch = 1.0
        self.max_batch_size = min(max_batch_size, menu.max_batch_size)
        self._policy = policy
        self._refuses_early = refuses_early
        self._rows = [list(option.seconds) for option in menu.options]
        self._drift = [1.0] * len(menu.options)
        self._waiting: list[Entry] = []
        self._admitted: set[Entry] = set()
        self._deadlines: dict[int, list[float]] = {}  # of everyone admitted, by priority, ascending
        self._rate = ArrivalRate(RATE_TIME_S)
        self._lasting_rate = ArrivalRate(LASTING_TIME_S)
        self._recent: deque[Wish] = deque(maxlen=REMEMBERED_WISHES)
        self._budgets: list[float] = []  # of the recent, ascending
        self._turnaround = 1.0  # what the engine is taken for a batch, over the batch itself
        self._busy_until = -math.inf
        self._lock = threading.RLock()  # its methods call one another

    def __len__(self) -> int:
        """Count who waits for the engine."""
        return len(self._waiting)

    @_locked
    def admit(self, entry: Entry, now: float, preparation: Preparation = READY) -> None:
        """Take note of a request before anything is spent on it.

        Args:
            entry: the request.
            now: the instant.
            preparation: what it has before it until it is ready for the engine; by default nothing.

        Raises:
            OverloadedError: even the cheapest sub-network could not answer it in time, unless those of lower priority
                and those due later are put behind it; says when to try again.
        """
        refusal = self._refusal(entry, now, preparation)
        if refusal is None or refusal.reason != "no_time":  # all others a cheaper level may help, be it to be decoded
            self._rate.count(now)
            self._lasting_rate.count(now)
        if refusal is not None:
            if refusal.reason == "backlog":  # a cheaper level would have cured nothing else
                self.prudence.observe(0, 1, now)
            raise refusal
        self._admitted.add(entry)
        insort(self._deadlines.setdefault(entry.priority, []), entry.deadline_at)

    @_locked
    def enter(self, entry: Entry) -> None:
        """Put an admitted request where the policy sees it: it is ready for the engine."""
        insort(self._waiting, entry, key=_deadline)
        if len(self._recent) == REMEMBERED_WISHES:
            oldest = self._recent[0].budget_s
            del self._budgets[bisect_left(self._budgets, oldest)]
        self._recent.append(entry.wish)
        insort(self._budgets, entry.wish.budget_s)

    @_locked
    def leave(self, entry: Entry) -> None:
        """Forget an admitted request, wherever it stands; one that is gone already is no error."""
        if entry in self._admitted:  # but once: others may be due at the same instant
            self._admitted.remove(entry)
            deadlines = self._deadlines[entry.priority]
            del deadlines[bisect_left(deadlines, entry.deadline_at)]
            if not deadlines:
                del self._deadlines[entry.priority]
        start = bisect_left(self._waiting, entry.deadline_at, key=_deadline)
        for index in range(start, len(self._waiting)):
            if self._waiting[index] is entry:
                del self._waiting[index]
                return
            if self._waiting[index].deadline_at != entry.deadline_at:
                return

    @_locked
    def next_batch(self, now: float) -> Choice:
        """Ask the policy what to do with those who wait, and take out whom it runs or gives up."""
        if not self._waiting:
            return Choice(None)
        situation = self.situation(now)
        choice = self._policy(situation)
        for entry in (*choice.batch, *choice.late, *choice.shed):
            self.leave(entry)
        self.prudence.observe(len(choice.batch), len(choice.late) + len(choice.shed), now)
        if choice.option is not None:
            self._busy_until = now + situation.seconds(choice.option, len(choice.batch)) * self._stretch
        return choice

    @_locked
    def finished(self, option: int, size: int, seconds: float, now: float, turnaround_s: float = 0.0) -> None:
        """Learn from a batch: the machine's slowdown, and how far off the profile of its option is.

        Args:
            option: that ran.
            size: of the batch.
            seconds: that it took.
            now: when it ended.
            turnaround_s: from when the engine was free, and somebody waited, until the batch began.
        """
        taken = min(1 + turnaround_s / max(seconds, NO_TIME_S), MAX_TURNAROUND)
        self._turnaround += TURNAROUND_GAIN * (taken - self._turnaround)
        expected = self._rows[option][size - 1]
        surprise = seconds / (expected * max(self.slowdown.factor, 0.1)) - 1
        self.slowdown = self.slowdown.updated(seconds / expected, now)
        drift = self._drift[option] * (1 + DRIFT_GAIN * max(-MAX_DRIFT, min(MAX_DRIFT, surprise)))
        self._drift[option] = max(1 - MAX_DRIFT, min(1 + MAX_DRIFT, drift))
        self._rows[option] = [self._drift[option] * profiled for profiled in self.menu.options[option].seconds]
        self._busy_until = now

    @_locked
    def answered_late(self, now: float) -> None:
        """Take note that an answer came too late in spite of all."""
        self.prudence.observe(0, 1, now)

    @_locked
    def failed(self, now: float) -> None:
        """Take note that the batch has ended without an answer: nothing is learned from its time."""
        self._busy_until = now

    @_locked
    def preview(self, entry: Entry, now: float, preparation: Preparation = READY) -> tuple[int, int, float, Choice]:
        """Tell what would become of a request that arrived now; nothing changes.

        Returns:
            Its option, the size of its batch, the seconds until that batch starts, and the decision.

        Raises:
            OverloadedError: it would be refused, or given up.
        """
        if refusal := self._refusal(entry, now, preparation):
            raise refusal
        ready_at = now + preparation.total_s
        situation = self.situation(now)
        line = sorted([*self._waiting, entry], key=_deadline)
        start = time = max(ready_at, self._busy_until)
        waiting = len(line)
        for _ in range(MAX_PREVIEWED):
            choice = self._policy(replace(situation, now=time, line=line))
            if entry in choice.batch and choice.option is not None:
                return choice.option, len(choice.batch), time - now, choice
            gone = {*choice.batch, *choice.late, *choice.shed}
            if entry in gone or not gone:
                break
            line = [other for other in line if other not in gone]
            if choice.option is not None:
                time += situation.seconds(choice.option, len(choice.batch)) * self._stretch
        else:
            time += (time - start) / (waiting - len(line)) * line.index(entry)
            option = target(entry.wish, min(choice.option or 0, self.menu.num_levels - 1))
            if time + situation.seconds(option, 1) <= entry.deadline_at:
                return option, max(1, len(choice.batch)), time - now, choice
        raise OverloadedError("it would be given up so that others can be answered in time", "given_up", 0.0)

    @_locked
    def predict(self, option: int, size: int, now: float) -> float:
        """Return the seconds that a batch will probably take."""
        return self._rows[option][size - 1] * self.slowdown.predict(now, self.prior_slowdown)

    @_locked
    def backlog_s(self, now: float) -> float:
        """Return the seconds that everyone admitted takes at the cheapest level."""
        return len(self._admitted) / self.max_batch_size * self.predict(0, self.max_batch_size, now) * self._stretch

    @_locked
    def situation(self, now: float) -> Situation:
        """Describe this moment to a policy."""
        likely, cautious = (self.slowdown.predict(now, self.prior_slowdown, spreads) for spreads in (0, CAUTIOUS))
        return Situation(
            now=now,
            line=self._waiting,
            menu=self.menu,
            rows=self._rows,
            slowdown=likely,
            caution=cautious / likely,
            stretch=self._stretch,
            max_batch_size=self.max_batch_size,
            arrival_rate=self._rate.read(now),
            lasting_rate=self._lasting_rate.read(now),
            recent=self._recent,
            tight_budget_s=self._budgets[int(TIGHT_QUANTILE * len(self._budgets))] if self._budgets else math.inf,
            prudence=self.prudence.read(now),
        )

    @property
    def _stretch(self) -> float:
        return max(self.pause_stretch, self._turnaround)  # what lies between batches goes by within a pause

    def _refusal(self, entry: Entry, now: float, preparation: Preparation) -> OverloadedError | None:
        if not self._refuses_early:
            return None
        ready_at = now + preparation.alone_s + preparation.crowd_s
        own_s = self._rows[target(entry.wish, 0)][0] * self.slowdown.predict(now, self.prior_slowdown)
        engine_at, decoded_at = self._expected_end(entry, now, ready_at), ready_at + preparation.queue_s + own_s
        late_s = max(engine_at, decoded_at) - entry.deadline_at
        if late_s <= 0:
            return None
        if now + preparation.alone_s + own_s > entry.deadline_at:
            message = "even if nothing else waited it would be answered too late at this moment; grant it more time"
            return OverloadedError(message, "no_time", late_s)
        if ready_at + own_s > entry.deadline_at or engine_at <= entry.deadline_at:
            message = "too many are being read and decoded to answer it in time; try again later"
            return OverloadedError(message, "preparation", late_s)
        message = "too much is waiting: even the cheapest sub-network would answer too late; try again later"
        return OverloadedError(message, "backlog", late_s)

    def _expected_end(self, entry: Entry, now: float, ready_at: float) -> float:
        """When a newcomer would be answered if everyone before it ran at the cheapest level, in the largest batches."""
        row, slowdown = self._rows[0], self.slowdown.predict(now, self.prior_slowdown)
        full_s = row[self.max_batch_size - 1] * slowdown * self._stretch
        ahead = self._deadlines_before(entry)
        time, index = max(ready_at, self._busy_until), 0
        if self._lasting_rate.read(now) * full_s > self.max_batch_size:
            # What comes after this one presses, too: better refused now than later. Nobody whose budget holds no two
            # full batches, one to wait for and its own, meets full ones.
            usual = max(1, bisect_right(row, entry.wish.budget_s / 2 / slowdown, 0, self.max_batch_size))
            time += LASTING_MARGIN * row[usual - 1] * slowdown * self._stretch
        while index < len(ahead):
            if ahead[index] < time + row[0] * slowdown:
                index += 1  # will have to be given up
                continue
            size = min(self.max_batch_size, len(ahead) - index)
            index += size
            if index == len(ahead) and size < self.max_batch_size and entry.wish.only is None:
                together = time + row[size] * slowdown
                if together <= ahead[index - size]:
                    return together
            time += row[size - 1] * slowdown * self._stretch
        return time + self._rows[target(entry.wish, 0)][0] * slowdown

    def _deadlines_before(self, entry: Entry) -> list[float]:
        """Deadlines of those who are served before `entry` is, ascending."""
        before = [
            deadlines[: bisect_right(deadlines, entry.deadline_at)]
            for priority, deadlines in self._deadlines.items()
            if priority >= entry.priority
        ]
        return before[0] if len(before) == 1 else sorted(chain.from_iterable(before))
