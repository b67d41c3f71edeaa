import asyncio

import pytest

from service.execution.turns import TURNS, InTurns

pytestmark = pytest.mark.anyio


async def test_many_items_are_handled_in_order_over_some_turns_of_the_event_loop() -> None:
    turn, handled = 0, list[tuple[int, int]]()
    in_turns = InTurns[int](lambda item: handled.append((item, turn)))
    in_turns.add(range(16))
    in_turns.add(range(16, 20))  # while it is at it
    assert len(handled) == 2
    while len(handled) < 20:
        turn += 1
        await asyncio.sleep(0)
    assert [item for item, _ in handled] == list(range(20))
    assert max(sum(at == each for _, at in handled) for each in range(turn + 1)) <= 3
    assert turn <= 2 * TURNS


async def test_one_item_is_handled_at_once() -> None:
    handled = list[str]()
    InTurns(handled.append).add(["only"])
    assert handled == ["only"]


async def test_what_waits_can_be_finished_and_more_be_added_then() -> None:
    handled = list[int]()
    in_turns = InTurns(handled.append)
    in_turns.add(range(20))
    in_turns.finish()
    assert handled == list(range(20))
    in_turns.add([20])
    assert handled == list(range(21))
    await asyncio.sleep(0)  # the turn that was planned finds nothing
    assert handled == list(range(21))
