"""The nouns of a decision: what a request grants, what a policy may look at, and what it answers. Pure values."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.menu import Menu, Rows


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request grants, as the forecast remembers it.

    Attributes:
        budget_s: from arrival until its batch must have ended.
        limit: the highest level that its GFLOPs admit.
        only: index of the option asked for by name.
        beyond: index of the option to take where the level is above the limit: one between that level and the next,
            which uses the GFLOPs up; None for the limit itself.
    """

    budget_s: float
    limit: int
    only: int | None = None
    beyond: int | None = None


def target(wish: Wish, level: int) -> int:
    """The option that a request gets at `level`."""
    if wish.only is not None:
        return wish.only
    if level <= wish.limit:
        return level
    return wish.limit if wish.beyond is None else wish.beyond


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A request in the line; two are never the same.

    Attributes:
        deadline_at: when its batch must have ended, in seconds on the monotonic clock.
        wish: what it grants.
        priority: 0 is normal; lower may be given up first.
    """

    deadline_at: float
    wish: Wish
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Preparation:
    """What lies between a request and the line, in seconds.

    Attributes:
        alone_s: were nobody else in the server.
        crowd_s: more, for an event loop that serves others as well.
        queue_s: more, for images that are decoded before it. The engine works off those ahead meanwhile.
    """

    alone_s: float = 0.0
    crowd_s: float = 0.0
    queue_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.alone_s + self.crowd_s + self.queue_s


READY = Preparation()


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a policy may look at.

    Attributes:
        now: in seconds on the monotonic clock.
        line: what waits, earliest deadline first; never empty.
        menu: what can be chosen.
        rows: latency of the options as corrected by what was observed, before `slowdown`.
        slowdown: factor on the rows at this moment.
        caution: factor on the slowdown that few batches exceed, at least 1.
        stretch: how much longer than its batches the engine is taken, at least 1: because of what lies between
            them, and because a ceiling makes it pause.
        max_batch_size: most that may run together.
        arrival_rate: requests per second, of late.
        recent: the wishes of the last arrivals.
        tight_budget_s: a budget that few of the recent ones undercut.
        lasting_rate: the arrival rate over a longer time, which leaves out what is only a crowd.
        prudence: factor on the times of every level but the cheapest, at least 1: requests have been missed of late.
    """

    now: float
    line: Sequence[Entry]
    menu: Menu
    rows: Rows
    slowdown: float
    caution: float
    stretch: float
    max_batch_size: int
    arrival_rate: float
    recent: Sequence[Wish]
    tight_budget_s: float
    lasting_rate: float = 0.0
    prudence: float = 1.0

    def seconds(self, option: int, size: int) -> float:
        """Predict the latency of a batch."""
        return self.rows[option][size - 1] * self.slowdown

    def fitting(self, option: int, room_s: float, waiting: int) -> int:
        """Find the largest batch of `option` that ends within the room: at most what waits, 0 if not even one fits."""
        return min(bisect_right(self.rows[option], room_s / self.slowdown), waiting, self.max_batch_size)


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do now.

    Attributes:
        option: index of the option to run; None if nothing is worth running.
        batch: whom to run together, all of whom grant the option.
        late: to refuse because they can no longer be answered in time.
        shed: to refuse because others would be late with them.
        reason: why, for a person to read.
    """

    option: int | None
    batch: tuple[Entry, ...] = ()
    late: tuple[Entry, ...] = ()
    shed: tuple[Entry, ...] = ()
    reason: str = ""


Policy = Callable[[Situation], Choice]
