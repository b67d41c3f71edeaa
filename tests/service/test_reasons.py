from dataclasses import replace

from service.menu import Menu
from service.reasons import explain
from service.situation import Choice, Wish


def test_a_reason_names_the_wish_where_the_wish_decided_and_the_line_where_the_line_did(menu: Menu) -> None:
    by_line = Choice(1, reason="because of the line")
    assert explain(menu, Wish(1.0, 0, only=3), None, 3, by_line) == "grid 2 at keep rate 1 was asked for by name"
    assert explain(menu, Wish(1.0, 2), None, 2, by_line) == "because of the line"
    assert explain(menu, Wish(1.0, 1), 0.5, 0, by_line) == "because of the line"  # lower than its limit
    assert explain(menu, Wish(1.0, 1), 0.000122, 1, by_line) == (
        "grid 4 at keep rate 0.5 is the most accurate within 0.000122 GFLOPs; "
        "the next better one, grid 4 at keep rate 1, costs 0.000135344"
    )
    assert explain(menu, Wish(1.0, 2), 5.0, 2, by_line) == (
        "5 GFLOPs admit the most accurate sub-network, grid 4 at keep rate 1"
    )
    unmeasured = replace(menu, is_measured=False)
    assert "is the largest within" in explain(unmeasured, Wish(1.0, 1), 0.000122, 1, by_line)
