"""The latencies of batches of 1, 2, 3 and 4 are those of conftest's fast_menu.

level 0: 20 30 40 50 ms
level 1: 40 60 80 100 ms
level 2: 80 120 160 200 ms
"""

import math
import random

import pytest

from service.errors import OverloadedError
from service.line import LASTING_TIME_S, REMEMBERED_WISHES, Line
from service.menu import Menu
from service.policy import choose_level
from service.situation import READY, Choice, Entry, Preparation, Situation, Wish

LONG_S = 1000.0  # after it, the arrivals before are no news any more


def waits(deadline_at: float, *, budget_s: float = 9.0, only: int | None = None, priority: int = 0) -> Entry:
    return Entry(deadline_at, Wish(budget_s, 2 if only is None else 0, only), priority)


@pytest.fixture
def line(fast_menu: Menu) -> Line:
    return Line(fast_menu, choose_level, 4)


def fill(line: Line, *entries: Entry, now: float = 0.0) -> tuple[Entry, ...]:
    for entry in entries:
        line.admit(entry, now)
        line.enter(entry)
    return entries


def test_whoever_is_due_first_stands_first_and_equals_in_order_of_arrival(line: Line) -> None:
    last, first, early, late = fill(line, waits(4.0), waits(1.0), waits(2.0), waits(2.0))
    assert list(line.situation(0.0).line) == [first, early, late, last]
    assert len(line) == 4


def test_an_empty_line_decides_nothing(line: Line) -> None:
    assert line.next_batch(0.0) == Choice(None)


def test_those_who_run_or_are_given_up_stand_in_line_no_longer(fast_menu: Menu) -> None:
    def one_of_each(situation: Situation) -> Choice:
        first, second, third, *_ = situation.line
        return Choice(0, batch=(first,), late=(second,), shed=(third,))

    line = Line(fast_menu, one_of_each, 4)
    *_, left = fill(line, *(waits(1.0 + number) for number in range(4)))
    line.next_batch(0.0)
    assert list(line.situation(0.0).line) == [left]
    assert line.backlog_s(0.0) == pytest.approx(0.05 / 4)


def test_a_request_counts_from_its_admission_until_it_leaves(line: Line) -> None:
    entry = waits(1.0)
    line.admit(entry, 0.0)
    assert len(line) == 0
    assert line.backlog_s(0.0) == pytest.approx(0.05 / 4)
    line.enter(entry)
    assert len(line) == 1
    line.leave(entry)
    assert len(line) == 0
    assert line.backlog_s(0.0) == 0.0


def test_leaving_twice_takes_nobody_else_along(line: Line) -> None:
    gone, twin = fill(line, waits(1.0), waits(1.0))
    line.leave(gone)
    line.leave(gone)
    assert list(line.situation(0.0).line) == [twin]
    assert line.backlog_s(0.0) == pytest.approx(0.05 / 4)
    line.leave(twin)
    assert line.backlog_s(0.0) == 0.0


def test_whatever_happens_the_books_are_right_and_empty_in_the_end(fast_menu: Menu) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        line, now = Line(fast_menu, choose_level, 4), 0.0
        decoding: list[Entry] = []
        waiting: list[Entry] = []
        gone: list[Entry] = []
        for _ in range(150):
            now += rng.choice((0.0, 0.001, 0.03))
            match rng.choice(("come", "come", "decoded", "leave", "again", "run")):
                case "come":
                    entry = waits(now + rng.choice((0.01, 0.1, 0.1, 0.6)), priority=-rng.randrange(2))
                    try:
                        line.admit(entry, now)
                        decoding.append(entry)
                    except OverloadedError:
                        gone.append(entry)
                case "decoded" if decoding:
                    waiting.append(decoding.pop(rng.randrange(len(decoding))))
                    line.enter(waiting[-1])
                case "leave" if decoding or waiting:
                    gone.append(rng.choice(decoding + waiting))
                    line.leave(gone[-1])
                case "again" if gone:
                    line.leave(rng.choice(gone))
                case "run":
                    choice = line.next_batch(now)
                    taken = [*choice.batch, *choice.late, *choice.shed]
                    assert bool(taken) == bool(waiting)
                    assert set(taken) <= set(waiting)
                    gone += taken
            decoding = [entry for entry in decoding if entry not in gone]
            waiting = [entry for entry in waiting if entry not in gone]
            assert set(line.situation(now).line) == set(waiting)
            admitted = len(decoding) + len(waiting)
            assert line.backlog_s(now) == pytest.approx(admitted / 4 * line.predict(0, 4, now))
        for entry in (*decoding, *waiting):
            line.leave(entry)
        assert len(line) == 0
        assert line.backlog_s(now) == 0.0
        assert not line._deadlines  # of whichever priority


# Admission


def refusal_s(line: Line, entry: Entry, now: float, preparation: Preparation = READY) -> float | None:
    """Seconds after which to try again, None if the request is admitted."""
    try:
        line.admit(entry, now, preparation)
    except OverloadedError as error:
        return float(error.details["retry_after_s"])
    return None


@pytest.mark.parametrize(
    ("due", "retry_after_s"), [(0.019, 0.001), (0.021, None), (1e-12, 0.02), (-9.0, 9.02), (1e6, None)]
)
def test_what_not_even_the_cheapest_can_answer_in_time_is_refused(
    line: Line, due: float, retry_after_s: float | None
) -> None:
    assert refusal_s(line, waits(due), 0.0) == retry_after_s


def test_those_due_before_are_reckoned_with_at_the_cheapest_level_in_full_batches(line: Line) -> None:
    fill(line, *(waits(0.101) for _ in range(8)))  # the last of the eight end at 100 ms, a newcomer at 120
    assert refusal_s(line, waits(0.115), 0.0) == pytest.approx(0.005)
    assert refusal_s(line, waits(0.121), 0.0) is None
    assert refusal_s(line, waits(0.1), 0.0) is None  # it is due before the eight


def test_a_newcomer_joins_a_batch_that_is_not_full(line: Line) -> None:
    fill(line, *(waits(0.051) for _ in range(3)))  # alone after the three, it would end at 60 ms
    assert refusal_s(line, waits(0.055), 0.0) is None
    assert refusal_s(line, waits(0.055), 0.0) == pytest.approx(0.015)  # the fifth has a batch of its own


def test_a_newcomer_joins_no_batch_that_would_be_late_with_it(line: Line) -> None:
    fill(line, *(waits(0.041) for _ in range(3)))
    assert refusal_s(line, waits(0.055), 0.0) == pytest.approx(0.005)


@pytest.mark.parametrize("how", ["ended", "failed"])
def test_the_batch_that_runs_delays_a_newcomer_until_it_has_ended(line: Line, how: str) -> None:
    fill(line, *(waits(0.06) for _ in range(4)))
    line.situation(LONG_S)  # so that no others are expected
    assert line.next_batch(0.0).option == 0  # until 50 ms
    assert refusal_s(line, waits(0.069), 0.01) == pytest.approx(0.001)
    if how == "ended":
        line.finished(0, 4, 0.05, 0.03)
    else:
        line.failed(0.03)
    assert refusal_s(line, waits(0.069), 0.03) is None


def test_the_decoding_to_come_delays_a_newcomer(line: Line) -> None:
    assert refusal_s(line, waits(0.069), 0.01, Preparation(0.04)) == pytest.approx(0.001)
    assert refusal_s(line, waits(0.069), 0.01, Preparation(0.03)) is None


@pytest.mark.parametrize(
    ("preparation", "reason"),
    [
        (Preparation(alone_s=0.981), "no_time"),
        (Preparation(alone_s=0.9, crowd_s=0.081), "preparation"),
        (Preparation(alone_s=0.9, queue_s=0.081), "preparation"),
        (Preparation(alone_s=0.9, crowd_s=0.04, queue_s=0.039), None),
    ],
)
def test_what_lies_before_the_line_is_told_from_the_line(
    line: Line, preparation: Preparation, reason: str | None
) -> None:
    reasons = []
    for ask in (line.admit, line.preview):  # what is told is what would be done
        try:
            ask(waits(1.0), 0.0, preparation)
        except OverloadedError as error:
            reasons.append(error.reason)
    assert reasons == [reason] * 2 if reason else not reasons
    assert line.prudence.read(0.0) == 1.0  # no cheaper level would have cured it


def test_while_others_are_decoded_the_engine_works_off_those_ahead(line: Line) -> None:
    fill(line, *(waits(0.3) for _ in range(8)))  # 100 ms at level 0, within which the queue shrinks as well
    assert refusal_s(line, waits(0.3), 0.0, Preparation(0.01, queue_s=0.26)) is None
    assert refusal_s(line, waits(0.3), 0.0, Preparation(0.01, queue_s=0.28)) == pytest.approx(0.01)


def test_a_name_that_is_slow_is_refused_sooner(line: Line) -> None:
    assert refusal_s(line, waits(0.079, only=2), 0.0) == pytest.approx(0.001)
    assert refusal_s(line, waits(0.079), 0.0) is None


def test_the_lowest_priority_is_refused_first(fast_menu: Menu) -> None:
    line = Line(fast_menu, choose_level, 4)
    fill(line, *(waits(0.101) for _ in range(8)))
    assert refusal_s(line, waits(0.101, priority=-1), 0.0) == pytest.approx(0.019)
    low = Line(fast_menu, choose_level, 4)
    fill(low, *(waits(0.101, priority=-1) for _ in range(8)))
    assert refusal_s(low, waits(0.101), 0.0) is None  # it goes before them all


def test_those_who_will_be_late_anyway_keep_nobody_out(line: Line) -> None:
    fill(line, *(waits(0.2) for _ in range(12)))  # they take until 150 ms
    assert refusal_s(line, waits(0.24), 0.185) is None  # there is no time left for the twelve


def test_coming_back_after_the_time_named_helps(fast_menu: Menu) -> None:
    line = Line(fast_menu, lambda situation: Choice(0, tuple(situation.line[:4])), 4)
    fill(line, *(waits(0.109) for _ in range(8)))
    assert refusal_s(line, waits(0.109), 0.0) == pytest.approx(0.011)  # the eight end at 100 ms, it ends at 120
    line.next_batch(0.0)
    assert refusal_s(line, waits(0.109 + 0.010), 0.010) is not None
    assert refusal_s(line, waits(0.109 + 0.0111), 0.0111) is None


def test_under_lasting_overload_a_newcomer_is_refused_sooner(line: Line) -> None:
    # Level 0 answers 80 a second; 100 come. Three tenths of a full batch are added: 15 ms.
    at = 0.0
    while at < 4 * LASTING_TIME_S:
        line.admit(waits(at + 1e6), at)
        at += 0.01
    assert refusal_s(line, waits(at + 0.034), at) == pytest.approx(0.001)
    assert refusal_s(line, waits(at + 0.036), at) is None
    # A budget of 50 ms holds two batches of one, 20 ms each, and none of four: 6 ms are added.
    assert refusal_s(line, waits(at + 0.025, budget_s=0.05), at) == pytest.approx(0.001)
    assert refusal_s(line, waits(at + 0.027, budget_s=0.05), at) is None


def test_a_line_for_a_policy_that_drops_later_refuses_nobody(fast_menu: Menu) -> None:
    line = Line(fast_menu, choose_level, 4, refuses_early=False)
    assert refusal_s(line, waits(-5.0), 0.0) is None


def test_a_million_priorities_leave_nothing_behind(line: Line) -> None:
    for number in range(1000):
        entry = waits(1.0, priority=-1000 * number)
        line.admit(entry, 0.0)
        line.leave(entry)
        with pytest.raises(OverloadedError):
            line.admit(waits(0.001, priority=-1000 * number), 0.0)
    assert not line._deadlines


# What a policy is told


def test_the_very_first_request_of_all_is_no_crowd(line: Line) -> None:
    fill(line, waits(0.2, budget_s=0.2))  # at the best level there is time for two of 80 ms, not for five
    assert line.next_batch(0.0).option == 2


def test_a_policy_is_told_a_budget_that_one_in_twenty_of_the_recent_undercuts(fast_menu: Menu) -> None:
    line = Line(fast_menu, choose_level, 4, refuses_early=False)
    assert line.situation(0.0).tight_budget_s == math.inf
    rng = random.Random(0)
    budgets = [rng.choice((0.5, 1.0, 30.0, 1e9)) + rng.randrange(3) for _ in range(3 * REMEMBERED_WISHES)]
    for budget_s in budgets:
        fill(line, waits(budget_s, budget_s=budget_s))
    recent = budgets[-REMEMBERED_WISHES:]
    situation = line.situation(0.0)
    assert [wish.budget_s for wish in situation.recent] == recent
    assert situation.tight_budget_s == sorted(recent)[REMEMBERED_WISHES // 20]


def test_others_load_is_reckoned_with_before_the_first_slow_batch(line: Line) -> None:
    assert line.predict(2, 3, 0.0) == 0.16
    line.prior_slowdown = 1.5
    assert line.predict(2, 3, 0.0) == pytest.approx(0.24)
    assert line.situation(0.0).slowdown == 1.5
    assert refusal_s(line, waits(0.025), 0.0) == pytest.approx(0.005)


def test_a_slow_batch_is_felt_in_every_prediction_and_a_fast_one_again(line: Line) -> None:
    for number in range(6):
        line.finished(0, 4, 0.1, number / 100)  # twice what was profiled
    assert line.predict(1, 2, 0.05) > 1.8 * 0.06
    assert refusal_s(line, waits(0.05 + 0.035), 0.05) is not None
    for number in range(6, 30):
        line.finished(0, 4, 0.05, number / 100)
    assert line.predict(1, 2, 0.29) == pytest.approx(0.06, rel=0.15)
    assert refusal_s(line, waits(0.29 + 0.035), 0.29) is None


def test_what_is_chosen_allows_for_batches_that_vary(line: Line) -> None:
    for number in range(20):
        line.finished(0, 4, (0.04, 0.06)[number % 2], number / 100)
    situation = line.situation(0.19)
    assert situation.seconds(0, 4) == line.predict(0, 4, 0.19)
    assert 1.3 < situation.caution < 1.7


def test_who_asks_for_the_impossible_makes_nobody_prudent(line: Line) -> None:
    for _ in range(50):
        with pytest.raises(OverloadedError, match="even if nothing else waited"):
            line.admit(waits(0.015), 0.0)  # the cheapest level takes 20 ms
    assert line.situation(0.0).prudence == 1.0


def test_who_asks_for_the_impossible_is_no_load_to_plan_for(line: Line) -> None:
    for number in range(50):
        with pytest.raises(OverloadedError, match="even if nothing else waited"):
            line.admit(waits(0.015 + number), float(number))
    assert (line.situation(50.0).arrival_rate, line.situation(50.0).lasting_rate) == (0, 0)


def test_whom_only_others_keep_from_being_answered_is_load(line: Line) -> None:
    fill(line, *(waits(0.06) for _ in range(4)))
    counted = [line.situation(0.0).arrival_rate]
    crowd = Preparation(queue_s=5.0)
    for due_s, preparation, said in ((0.06, READY, "too much is waiting"), (1.0, crowd, "being read and decoded")):
        with pytest.raises(OverloadedError, match=said):
            line.admit(waits(due_s), 0.0, preparation)
        counted.append(line.situation(0.0).arrival_rate)
    assert counted[0] < counted[1] < counted[2]


def test_the_engine_is_taken_for_longer_than_its_batches(fast_menu: Menu) -> None:
    line = Line(fast_menu, lambda situation: Choice(2, tuple(situation.line[:4])), 4)  # four in 200 ms
    line.pause_stretch = 2.0
    settled(line, *(waits(5.0) for _ in range(8)))
    assert line.preview(waits(6.0), 0.0)[2] == pytest.approx(2 * 0.4)
    assert line.backlog_s(0.0) == pytest.approx(2 * 0.1)
    line.next_batch(0.0)
    line.next_batch(0.4)
    assert line.preview(waits(6.0), 0.4)[2] == pytest.approx(0.4)


def test_admission_reckons_with_what_lies_between_batches(line: Line) -> None:
    line.pause_stretch = 2.0
    fill(line, *(waits(0.06) for _ in range(4)))  # at the cheapest level they take 50 ms, and the engine is free at 100
    assert refusal_s(line, waits(0.11), 0.0) == pytest.approx(0.01)
    assert refusal_s(line, waits(0.13), 0.0) is None


def test_what_lies_between_batches_is_reckoned_with(line: Line) -> None:
    for number in range(100):
        line.finished(0, 4, 0.05, number / 10, turnaround_s=0.01)
    assert line.situation(9.9).stretch == pytest.approx(1.2, rel=1e-3)
    assert line.predict(0, 4, 9.9) == pytest.approx(0.05)  # the batch itself is as long as ever
    line.pause_stretch = 1.1  # what lies between them goes by within the pauses
    assert line.situation(9.9).stretch == pytest.approx(1.2, rel=1e-3)
    line.pause_stretch = 3.0
    assert line.situation(9.9).stretch == 3.0


def test_one_long_stop_between_batches_is_no_rule(line: Line) -> None:
    line.finished(0, 4, 0.05, 0.0, turnaround_s=60.0)
    assert line.situation(0.0).stretch == pytest.approx(1.1)


def test_an_option_that_always_takes_longer_than_profiled_is_known_after_a_while(line: Line) -> None:
    for number in range(300):
        line.finished(number % 2, 2, (0.03, 1.15 * 0.06)[number % 2], number / 100)
    predicted = [line.predict(option, 2, 2.99) for option in (0, 1)]
    assert predicted[1] / predicted[0] == pytest.approx(2 * 1.15, rel=0.03)


def test_no_correction_of_the_profile_exceeds_a_fifth(line: Line) -> None:
    for number in range(500):
        line.finished(number % 2, 2, (0.03, 5 * 0.06)[number % 2], number / 100)
    for row, option in zip(line.situation(5.0).rows, line.menu.options, strict=True):
        ratios = [seconds / profiled for seconds, profiled in zip(row, option.seconds, strict=True)]
        assert all(0.8 - 1e-9 <= ratio <= 1.2 + 1e-9 for ratio in ratios)


def test_what_memory_allows_bounds_the_batch(fast_menu: Menu) -> None:
    assert Line(fast_menu, choose_level, 64).max_batch_size == 4
    line = Line(fast_menu, choose_level, 4)
    line.max_batch_size = 2
    fill(line, *(waits(9.0) for _ in range(4)))
    assert len(line.next_batch(0.0).batch) == 2


def test_a_ceiling_makes_the_engine_busy_for_longer(line: Line) -> None:
    line.pause_stretch = 2.0
    fill(line, *(waits(0.06) for _ in range(4)))
    line.situation(LONG_S)
    assert line.next_batch(0.0).option == 0  # 50 ms of work, and as much of pause
    assert refusal_s(line, waits(0.119), 0.0) == pytest.approx(0.001)


# Preview


def settled(line: Line, *entries: Entry) -> Line:
    """Make entries wait for so long already that no others are expected."""
    fill(line, *entries, now=-LONG_S)
    line.situation(0.0)
    return line


def state(line: Line, now: float) -> tuple[object, ...]:
    situation = line.situation(now)
    return (
        list(situation.line),
        list(situation.recent),
        situation.tight_budget_s,
        pytest.approx(situation.arrival_rate),
        situation.slowdown,
        line.backlog_s(now),
        line._busy_until,
    )


def test_a_preview_changes_nothing(line: Line) -> None:
    settled(line, *(waits(due) for due in (0.3, 0.4, 0.5)))
    line.admit(waits(0.6), 0.0)
    before = state(line, 0.0)
    for entry in (waits(0.35), waits(0.9, only=3), waits(0.9, priority=-3)):
        line.preview(entry, 0.0)
        line.preview(entry, 0.0, Preparation(queue_s=0.1))
    with pytest.raises(OverloadedError):
        line.preview(waits(0.001), 0.0)
    assert state(line, 0.0) == before


def test_a_preview_tells_what_then_happens(fast_menu: Menu) -> None:
    previewed = 0
    for seed in range(60):
        rng = random.Random(seed)
        line = Line(fast_menu, choose_level, 4)
        settled(line, *(waits(rng.uniform(0.02, 0.9)) for _ in range(rng.randrange(12))))
        line.next_batch(0.0)  # so that the engine may be busy
        free_at = max(0.0, line._busy_until)
        entry = waits(rng.uniform(0.03, 0.9), priority=-rng.randrange(2))
        try:
            option, size, start_s, decision = line.preview(entry, 0.0)
        except OverloadedError:
            continue
        line.enter(entry)
        now, choice = free_at, line.next_batch(free_at)
        while entry not in choice.batch:
            now = max(now, line._busy_until)
            choice = line.next_batch(now)
        assert choice == decision
        assert (option, size) == (choice.option, len(choice.batch))
        assert start_s == pytest.approx(now)
        previewed += 1
    assert previewed > 30


def test_who_would_be_refused_or_given_up_learns_it_from_the_preview(line: Line) -> None:
    settled(line, *(waits(0.044) for _ in range(3)))  # three end at 40 ms
    with pytest.raises(OverloadedError, match="too much is waiting"):
        line.preview(waits(0.05), 0.0)
    with pytest.raises(OverloadedError, match="given up"):
        line.preview(waits(0.04), 0.0)  # the most urgent of four, of whom three can be answered


def test_a_preview_of_a_deep_line_asks_the_policy_a_few_times_only(fast_menu: Menu) -> None:
    asked = 0

    def counting(situation: Situation) -> Choice:
        nonlocal asked
        asked += 1
        return choose_level(situation)

    line = settled(Line(fast_menu, counting, 4), *(waits(1e5 + number) for number in range(1000)))
    option, size, start_s, _ = line.preview(waits(2e5), 0.0)
    assert asked < 10
    assert (option, size) == (2, 4)
    assert start_s == pytest.approx(1000 / 4 * 0.2, rel=0.01)


def test_a_preview_in_a_line_that_moves_too_slowly_says_so(fast_menu: Menu) -> None:
    line = Line(fast_menu, lambda situation: Choice(2, tuple(situation.line[:1])), 4)
    settled(line, *(waits(5.0) for _ in range(100)))  # one by one, each 80 ms
    with pytest.raises(OverloadedError, match="given up"):
        line.preview(waits(7.0), 0.0)
    assert line.preview(waits(9.0), 0.0)[2] == pytest.approx(8.0)


def test_what_is_missed_makes_the_next_choices_prudent(line: Line) -> None:
    assert line.situation(0.0).prudence == 1.0
    fill(line, *(waits(0.2) for _ in range(12)))  # they take until 150 ms
    assert refusal_s(line, waits(0.03), 0.0) is None
    assert refusal_s(line, waits(0.03), 0.0) is None
    assert refusal_s(line, waits(0.035), 0.0) is not None  # alone it would take 20 ms
    refused = line.situation(0.0).prudence
    line.answered_late(0.0)
    assert line.situation(0.0).prudence > refused > 1.0
