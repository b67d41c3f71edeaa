"""The menu of the hand-worked scenes, in seconds for batches of 1, 2, 3 and 4 (see conftest).

level 0:  2  3  4  5
level 1:  4  6  8 10
level 2:  8 12 16 20
option 3: 6  9 12 15, on no level
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from service.menu import Menu
from service.policy import MAX_PLANNED, choose_level
from service.situation import Choice, Entry, Situation, Wish


def waits(
    deadline_at: float, limit: int = 2, *, only: int | None = None, beyond: int | None = None, priority: int = 0
) -> Entry:
    return Entry(deadline_at, Wish(deadline_at, limit, only, beyond), priority)


def at_zero(menu: Menu, line: Sequence[Entry]) -> Situation:
    """Nothing is expected, nothing slows the machine, and up to four run together."""
    return Situation(
        now=0.0,
        line=line,
        menu=menu,
        rows=[option.seconds for option in menu.options],
        slowdown=1.0,
        caution=1.0,
        stretch=1.0,
        max_batch_size=4,
        arrival_rate=0.0,
        recent=(),
        tight_budget_s=math.inf,
    )


def choose(menu: Menu, *line: Entry) -> Choice:
    return choose_level(at_zero(menu, line))


def test_alone_and_without_a_budget_a_request_gets_the_most_accurate_sub_network(menu: Menu) -> None:
    choice = choose(menu, waits(1000.0))
    assert choice.option == 2
    assert choice.reason == "nothing else waits: grid 4 at keep rate 1 is the most accurate sub-network"


def test_a_deadline_lowers_the_level_of_a_request_that_waits_alone(menu: Menu) -> None:
    choice = choose(menu, waits(5.0))  # level 2 takes 8 s, level 1 takes 4
    assert choice.option == 1
    assert choice.reason == "5000 ms left: grid 4 at keep rate 0.5 is the most accurate that answers in time"


@pytest.mark.parametrize(("due", "level"), [(4.1, 0), (4.3, 1), (8.3, 1), (8.5, 2)])
def test_a_choice_that_only_just_fits_is_lowered(menu: Menu, due: float, level: int) -> None:
    assert choose(menu, waits(due)).option == level  # 4 and 8 s, each with 5 % to spare


def test_requests_that_fit_together_at_the_best_level_run_together_there(menu: Menu) -> None:
    line = (waits(13.0), waits(13.0))  # two take 12 s
    choice = choose(menu, *line)
    assert (choice.option, choice.batch) == (2, line)
    assert (
        choice.reason == "2 waiting: grid 4 at keep rate 1, the most accurate sub-network, answers all of them in time"
    )


def test_those_behind_the_head_lower_its_level(menu: Menu) -> None:
    # At level 2 the head alone ends at 8, and the other four end at 28. At level 1 three end at 8 and the rest at 14.
    line = (waits(9.0), *(waits(14.0) for _ in range(4)))
    choice = choose(menu, *line)
    assert (choice.option, choice.batch, choice.shed) == (1, line[:3], ())
    assert choice.reason == "5 waiting: grid 4 at keep rate 0.5 is the most accurate that answers all of them in time"


def test_without_measured_accuracy_the_reason_speaks_of_size(menu: Menu) -> None:
    unmeasured = replace(menu, is_measured=False)
    assert (
        choose(unmeasured, waits(99.0)).reason == "nothing else waits: grid 4 at keep rate 1 is the largest sub-network"
    )
    assert "is the largest that answers in time" in choose(unmeasured, waits(5.0)).reason


def test_arrivals_that_are_expected_lower_the_level(menu: Menu) -> None:
    # 40 a second: ten more in the next quarter of a second and three for chance, due 50 s after. Fourteen in fours and
    # a two end at 56 s at level 2, at 28 s at level 1.
    situation = replace(at_zero(menu, (waits(50.0),)), arrival_rate=40.0, recent=(Wish(50.0, 2),))
    choice = choose_level(situation)
    assert (choice.option, len(choice.batch)) == (1, 1)
    assert choice.reason.startswith("50000 ms left and others expected: grid 4 at keep rate 0.5")
    assert choose_level(replace(situation, arrival_rate=1.0)).option == 2  # a quarter of an arrival is none


def test_arrivals_that_outrun_even_the_cheapest_level_for_long_get_it(menu: Menu) -> None:
    # Four in 5 s are 0.8 a second. The one that waits could have level 2, but its time will be missed.
    crowd = replace(at_zero(menu, (waits(50.0),)), arrival_rate=0.85)
    assert choose_level(crowd).option == 2
    assert choose_level(replace(crowd, lasting_rate=0.75)).option == 2
    assert choose_level(replace(crowd, lasting_rate=0.85)).option == 0
    assert choose_level(replace(crowd, arrival_rate=0.0, lasting_rate=0.85)).option == 2  # it is over


def test_expected_arrivals_have_the_limits_of_the_recent_ones(menu: Menu) -> None:
    # As above; but those expected are content with level 0, so that one batch of level 2, then of 0, clears them all.
    situation = replace(at_zero(menu, (waits(50.0),)), arrival_rate=40.0, recent=(Wish(50.0, 0),))
    assert choose_level(situation).option == 2


def test_no_batch_is_longer_than_a_tight_newcomer_can_wait(menu: Menu) -> None:
    # One comes in 4 s and two in 8. Of a budget of 9 s, two at the cheapest level leave 6: the longest batch.
    # Level 1 is the best that has batches so short.
    line = [waits(100.0), waits(100.0)]
    busy = replace(at_zero(menu, line), arrival_rate=0.25, tight_budget_s=9.0)
    choice = choose_level(busy)
    assert choice.option == 1
    assert busy.seconds(1, len(choice.batch)) <= 6.0
    assert choose_level(replace(busy, arrival_rate=0.75)).option == 0
    outrun = choose_level(replace(busy, arrival_rate=0.85))  # four in 5 s are 0.8: only full batches can carry them
    assert len(outrun.batch) == 2
    assert busy.seconds(outrun.option or 0, 2) > 6.0
    quiet = choose_level(replace(busy, arrival_rate=0.01))  # nobody is likely to come meanwhile
    assert (quiet.option, len(quiet.batch)) == (2, 2)


def test_a_slow_machine_a_ceiling_and_little_memory_are_reckoned_with(menu: Menu) -> None:
    line = [waits(41.0) for _ in range(8)]  # two full batches of level 2 end at 40 s
    situation = at_zero(menu, line)
    assert choose_level(situation).option == 2
    assert choose_level(replace(situation, slowdown=1.5)).option == 1
    assert choose_level(replace(situation, caution=1.5)).option == 1  # it is at times
    assert choose_level(replace(situation, stretch=1.5)).option == 1  # 40 s of work take 60
    small = choose_level(replace(situation, max_batch_size=1))  # one by one, they take 64, 32 or 16 s
    assert (small.option, len(small.batch)) == (1, 1)


def test_deviations_of_batches_in_a_row_are_not_expected_to_add_up(menu: Menu) -> None:
    # Four batches of four at level 1 take 40 s. Of a quarter more for each, 2.5 s, two remain for four in a row.
    def level(due: float) -> int | None:
        line = [waits(due) for _ in range(16)]
        return choose_level(replace(at_zero(menu, line), caution=1.25)).option

    assert level(50.5) == 1
    assert level(47.0) == 1  # 30 s, 4.3 of margin and the last one's own 12.5
    assert level(46.0) == 0
    mixed = [waits(46.5, limit=1) for _ in range(8)] + [waits(47.0) for _ in range(8)]
    assert choose_level(replace(at_zero(menu, mixed), caution=1.25)).option == 1


def test_prudence_gives_up_accuracy_and_nobody(menu: Menu) -> None:
    situation = at_zero(menu, [waits(41.0) for _ in range(8)])  # two full batches of level 2 end at 40 s
    assert choose_level(replace(situation, prudence=1.5)).option == 1
    assert choose_level(replace(situation, prudence=3.0)).option == 0
    tight = at_zero(menu, [waits(10.1) for _ in range(8)])  # even level 0 takes 10 s
    choice = choose_level(replace(tight, prudence=3.0))
    assert "is the most accurate" in choice.reason  # the cheapest level counts as fast as it is
    assert (choice.option, len(choice.batch), choice.shed, choice.late) == (0, 4, (), ())


def test_latencies_as_corrected_count_and_not_as_profiled(menu: Menu) -> None:
    rows = [option.seconds for option in menu.options]
    rows[2] = (4.5, 6.0, 7.0, 8.0)
    assert choose_level(replace(at_zero(menu, (waits(5.0),)), rows=rows)).option == 2


def test_who_can_no_longer_be_answered_in_time_is_refused_and_the_others_run(menu: Menu) -> None:
    late, in_time = waits(1.9), waits(5.0)
    choice = choose(menu, late, in_time)
    assert (choice.late, choice.batch, choice.shed) == ((late,), (in_time,), ())
    assert choice.reason.startswith("5000 ms left: ")  # not those of the one who is late
    assert choose(menu, late) == Choice(None, late=(late,))


def test_who_insists_on_a_slow_sub_network_is_late_sooner(menu: Menu) -> None:
    named, other = waits(7.9, only=2), waits(7.9)
    choice = choose(menu, other, named)
    assert (choice.late, choice.batch) == ((named,), (other,))


def test_quality_is_lowered_before_anybody_is_given_up(menu: Menu) -> None:
    line = [waits(8.0) for _ in range(5)]  # only level 0 answers all: four end at 5, the last at 7
    choice = choose(menu, *line)
    assert (choice.option, choice.batch, choice.shed) == (0, tuple(line[:4]), ())


def test_in_a_burst_as_few_as_possible_are_given_up_and_the_most_urgent_first(menu: Menu) -> None:
    # Three end at 4, and two more at 7, too late. Without the first, three end at 4 and the last at 6. Without the
    # first two, the other three end at 4.
    line = [waits(due) for due in (4.0, 4.1, 4.2, 4.3, 4.4)]
    choice = choose(menu, *line)
    assert (choice.option, choice.shed, choice.batch) == (0, tuple(line[:2]), tuple(line[2:]))
    assert choice.reason == (
        "5 waiting and more expected than can be answered in time: grid 2 at keep rate 0.5 answers the most"
    )


def test_the_lowest_priority_is_given_up_before_the_most_urgent(menu: Menu) -> None:
    line = [*(waits(due) for due in (4.0, 4.1, 4.2)), waits(4.3, priority=-2), waits(4.4, priority=-1)]
    choice = choose(menu, *line)
    assert (choice.shed, choice.batch) == ((line[3], line[4]), tuple(line[:3]))


def test_a_low_priority_that_is_in_nobodys_way_is_answered(menu: Menu) -> None:
    line = (waits(13.0, priority=-9), waits(13.0))
    assert choose(menu, *line).batch == line


def test_low_priorities_are_not_given_up_where_nobody_gains_from_it(menu: Menu) -> None:
    # One in 2 s and four in 5: of the five that are due first, the first cannot be saved, by whomever is given up.
    urgent, low = [waits(due) for due in (2.5, 5.0, 5.1, 5.2, 5.3)], [waits(99.0, priority=-5) for _ in range(9)]
    choice = choose(menu, *urgent, *low)
    assert (choice.shed, choice.batch) == ((urgent[0],), tuple(urgent[1:]))
    line = [*(waits(due) for due in (3.5, 6.0, 6.0, 6.0, 9.0, 9.0)), *low]
    outrun = replace(at_zero(menu, line), arrival_rate=16.0, recent=(Wish(9.0, 2),))
    assert choose_level(outrun).shed == (line[0],)
    # But where they are due before others, each of them takes a place.
    line = [waits(3.5), *(waits(6.0, priority=-5) for _ in range(4)), *(waits(9.0) for _ in range(4))]
    outrun = replace(at_zero(menu, line), arrival_rate=16.0, recent=(Wish(12.0, 2),), tight_budget_s=12.0)
    choice = choose_level(outrun)
    assert (set(choice.shed), choice.batch) == (set(line[:5]), tuple(line[5:]))


def test_under_lasting_overload_the_batch_is_as_large_as_can_be(menu: Menu) -> None:
    # 16 a second come, and level 0 answers four in 5 s. For the sake of the head, which has 3.5 s, only two could run.
    line = [waits(due) for due in (3.5, 6.0, 6.0, 6.0, 9.0, 9.0)]
    situation = at_zero(menu, line)
    lasting = choose_level(replace(situation, arrival_rate=16.0, recent=(Wish(9.0, 2),)))
    assert (lasting.option, lasting.shed, lasting.batch) == (0, (line[0],), tuple(line[1:5]))
    for_long = replace(situation, arrival_rate=16.0, lasting_rate=16.0, recent=(Wish(9.0, 2),))
    assert choose_level(for_long) == lasting  # that even this level is outrun does not mean that it clears the line
    passing = choose_level(situation)  # two end at 3, two at 6, two at 9
    assert (passing.option, passing.shed, passing.batch) == (0, (), tuple(line[:2]))


def test_under_lasting_overload_no_batch_grows_beyond_what_tight_budgets_leave_room_for(menu: Menu) -> None:
    # Of a tight budget of 5 s, four fifths are 4: three at level 0, and the head has time for as many.
    line = [waits(due) for due in (4.5, 6.0, 6.0, 6.0, 9.0, 9.0)]
    outrun = replace(at_zero(menu, line), arrival_rate=16.0, recent=(Wish(5.0, 2),), tight_budget_s=5.0)
    choice = choose_level(outrun)
    assert (choice.option, choice.shed, choice.batch) == (0, (), tuple(line[:3]))


def test_a_batch_of_those_that_are_left_is_in_time_even_if_the_machine_varies(menu: Menu) -> None:
    situation = at_zero(menu, [waits(5.2) for _ in range(8)])  # four at level 0 end at 5 s, the others at 10
    assert len(choose_level(situation).batch) == 4
    assert len(choose_level(replace(situation, caution=1.25)).batch) == 3  # four may take 6.25 s, three 5


def test_the_reason_tells_of_prudence_and_of_being_outrun(menu: Menu) -> None:
    line = [waits(41.0) for _ in range(8)]
    prudent = choose_level(replace(at_zero(menu, line), prudence=1.5))
    assert prudent.reason == (
        "8 waiting: grid 4 at keep rate 0.5 is the most accurate that answers all of them in time if better ones take "
        "1.5 times as long (requests were missed of late)"
    )
    outrun = choose_level(replace(at_zero(menu, line), arrival_rate=0.85, lasting_rate=0.85))
    assert outrun.option == 0
    assert outrun.reason == (
        "8 waiting and, for seconds now, more coming than even grid 2 at keep rate 0.5 carries for long"
    )


def test_a_batch_shares_a_sub_network_that_every_member_may_have(menu: Menu) -> None:
    line = [waits(100.0, limit=0), waits(100.0), waits(101.0), waits(102.0, limit=0)]
    first = choose(menu, *line)
    assert (first.option, first.batch) == (0, (line[0], line[3]))
    second = choose(menu, line[1], line[2])
    assert (second.option, second.batch) == (2, (line[1], line[2]))


def test_a_batch_leaves_the_others_of_its_group_their_time(menu: Menu) -> None:
    # Two at level 2 take 12 of the head's 16 s, which leaves 4: three at level 0. All four of them would take 5.
    cheap = [waits(due, limit=0) for due in (16.0, 90.0, 90.0, 90.0)]
    good = [waits(17.0), waits(17.0)]
    first = choose(menu, cheap[0], *good, *cheap[1:])
    assert (first.option, first.batch) == (0, tuple(cheap[:3]))
    second = choose_level(replace(at_zero(menu, (*good, cheap[3])), now=4.0))
    assert (second.option, second.batch) == (2, tuple(good))


def test_who_asks_for_a_sub_network_by_name_runs_with_those_who_get_it_anyway(menu: Menu) -> None:
    line = (waits(100.0, limit=0, only=2), waits(100.0))
    choice = choose(menu, *line)
    assert (choice.option, choice.batch) == (2, line)


def test_what_is_on_no_level_runs_by_name(menu: Menu) -> None:
    line = (waits(100.0, limit=0, only=3), waits(100.0), waits(100.0, limit=0, only=3))
    choice = choose(menu, *line)
    assert (choice.option, choice.batch) == (3, (line[0], line[2]))


def test_a_name_is_never_lowered_along_with_the_head(menu: Menu) -> None:
    # Together at level 2 they take 12 s, which the head's 12.5 admit, but not with 5 % to spare: the head is lowered.
    head, named = waits(12.5), waits(13.0, limit=0, only=2)
    choice = choose(menu, head, named)
    assert (choice.option, choice.batch) == (1, (head,))


def test_a_budget_between_two_levels_is_used_up_while_the_level_is_above(menu: Menu) -> None:
    wish = waits(100.0, limit=1, beyond=3)
    assert choose(menu, wish).option == 3
    # All eight at option 3 would take 30 s, at level 1 they take 20.
    assert choose(menu, *(waits(25.0, limit=1, beyond=3) for _ in range(8))).option == 1
    assert choose(menu, waits(6.1, limit=1, beyond=3)).option == 1  # 6 s do not fit with 5 % to spare: its level then


def test_a_long_line_in_which_one_has_a_limit_is_looked_at_to_its_end(menu: Menu) -> None:
    # A hundred batches take 500 s at level 0 and 1000 at level 1; the first 128 alone would be ready in 640 at level 2.
    line = [*(waits(700.0) for _ in range(399)), waits(700.0, limit=0)]
    choice = choose(menu, *line)
    assert (choice.option, choice.shed) == (0, ())


def test_immense_budgets_and_a_thousand_priorities_change_nothing_for_the_head(menu: Menu) -> None:
    others = [waits(1e6 + number, priority=-number) for number in range(1000)]
    choice = choose(menu, waits(9.0), *others, waits(math.inf))
    assert (choice.option, len(choice.batch), choice.late, choice.shed) == (2, 1, (), ())


def random_situation(menu: Menu, seed: int) -> Situation:
    """Anything that can happen: deep lines, tight and immense budgets, limits, names, priorities, load."""
    rng = random.Random(seed)
    now = rng.uniform(-100, 100)
    longest = rng.choice((10.0, 60.0, 600.0))
    num_priorities = rng.choice((1, 3))

    def wish() -> Wish:
        budget_s = rng.uniform(0, longest)
        match rng.choice(("free", "free", "limit", "beyond", "name") if seed % 3 else ("free",)):
            case "limit":
                return Wish(budget_s, rng.randrange(3))
            case "beyond":
                return Wish(budget_s, 1, beyond=3)
            case "name":
                return Wish(budget_s, 0, only=rng.randrange(4))
        return Wish(budget_s, 2)

    wishes = [wish() for _ in range(rng.choice((1, 2, 5, 30, 300)))]
    line = [Entry(now + each.budget_s, each, -rng.randrange(num_priorities)) for each in wishes]
    drifts = [rng.uniform(0.8, 1.2) for _ in menu.options]
    return Situation(
        now=now,
        line=sorted(line, key=lambda entry: entry.deadline_at),
        menu=menu,
        rows=[
            [drift * seconds for seconds in option.seconds] for drift, option in zip(drifts, menu.options, strict=True)
        ],
        slowdown=rng.choice((0.5, 1.0, 3.0)),
        caution=rng.choice((1.0, 1.4)),
        stretch=rng.choice((1.0, 1.7)),
        max_batch_size=rng.randint(1, 4),
        arrival_rate=rng.choice((0.0, 0.5, 20.0, 5000.0)),
        recent=wishes[-128:],
        tight_budget_s=rng.choice((math.inf, min(each.budget_s for each in wishes))),
    )


def grants(wish: Wish, option: int) -> bool:
    return option == wish.only if wish.only is not None else option <= wish.limit or option == wish.beyond


def test_whatever_waits_everybody_gets_what_he_grants_or_is_given_up_in_order(menu: Menu) -> None:
    seen = set()
    for seed in range(400):
        situation = random_situation(menu, seed)
        line = list(situation.line)
        choice = choose_level(situation)
        assert situation.line == line
        assert choose_level(situation) == choice
        taken = (*choice.batch, *choice.late, *choice.shed)
        assert taken, "somebody runs or is given up"
        assert len(taken) == len(set(taken)), "nobody twice"
        assert set(taken) <= set(line)
        assert (choice.option is None) == (not choice.batch)
        assert len(choice.batch) <= situation.max_batch_size
        if choice.option is not None:
            assert all(grants(entry.wish, choice.option) for entry in choice.batch)
            left = [entry for entry in line if entry not in {*choice.late, *choice.shed}]
            assert choice.batch[0] is left[0], "the most urgent of those left runs"
            assert list(choice.batch) == sorted(choice.batch, key=lambda entry: entry.deadline_at)
            assert situation.now + situation.seconds(choice.option, len(choice.batch)) <= left[0].deadline_at
        if len(line) <= MAX_PLANNED:
            for given_up in choice.shed:
                lower = [entry for entry in choice.batch if entry.priority < given_up.priority]
                assert all(given_up.deadline_at <= entry.deadline_at for entry in lower), "in nobody's way"
        seen.add((choice.option, bool(choice.late), bool(choice.shed)))
    assert {option for option, _, _ in seen} == {None, 0, 1, 2, 3}
    assert {shed for _, _, shed in seen} == {False, True}


def test_who_was_planned_for_is_answered_in_time_when_all_goes_as_predicted(menu: Menu) -> None:
    """The level is chosen so that nobody in line is late; then, if nothing else comes, nobody is."""
    checked = 0
    for seed in range(0, 300, 3):  # nobody has a limit
        situation = replace(random_situation(menu, seed), arrival_rate=0.0, tight_budget_s=math.inf)
        choice = choose_level(situation)
        line, now = list(situation.line), situation.now
        if choice.option in (None, 0) or choice.late:
            continue  # so the level that was chosen has one below it, in reserve
        checked += 1
        while line:
            choice = choose_level(replace(situation, line=line, now=now))
            assert not choice.late
            assert not choice.shed
            assert choice.option is not None
            now += situation.seconds(choice.option, len(choice.batch)) * situation.stretch
            line = [entry for entry in line if entry not in choice.batch]
    assert checked > 10
