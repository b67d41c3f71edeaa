import pytest

from service.menu import Menu
from service.situation import Entry, Situation, Wish, target


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(1.0, 2), [0, 1, 2]),
        (Wish(1.0, 1), [0, 1, 1]),
        (Wish(1.0, 0), [0, 0, 0]),
        (Wish(1.0, 1, beyond=5), [0, 1, 5]),
        (Wish(1.0, 0, only=7), [7, 7, 7]),
    ],
)
def test_a_request_gets_the_level_up_to_its_limit_what_uses_its_budget_up_above_and_its_name_always(
    wish: Wish, expected: list[int]
) -> None:
    assert [target(wish, level) for level in range(3)] == expected


def test_two_requests_that_grant_the_same_are_still_two() -> None:
    first, second = Entry(1.0, Wish(1.0, 2)), Entry(1.0, Wish(1.0, 2))
    assert first != second
    assert len({first, second}) == 2


def test_the_largest_batch_that_fits_is_bounded_by_the_room_those_who_wait_and_the_limit(menu: Menu) -> None:
    rows = [option.seconds for option in menu.options]
    situation = Situation(0.0, (), menu, rows, 2.0, 1.0, 1.0, 3, 0.0, (), 1.0)
    # At twice the profiled latency, level 0 takes 4, 6, 8 and 10 s.
    assert situation.seconds(0, 2) == 6.0
    rooms = (-1.0, 3.9, 4.0, 7.9, 8.0, 100.0, float("inf"))
    assert [situation.fitting(0, room_s, waiting=9) for room_s in rooms] == [0, 0, 1, 2, 3, 3, 3]
    assert situation.fitting(0, 100.0, waiting=2) == 2
