import asyncio

import pytest

from service.execution.turns import AT_ONCE, InTurns

pytestmark = pytest.mark.anyio


async def test_many_items_are_handled_in_order_over_some_turns_of_the_event_loop() -> None:
    handled, counts = list[int](), list[int]()
    in_turns = InTurns(handled.append)
    in_turns.add(range(2 * AT_ONCE))
    in_turns.add(range(2 * AT_ONCE, 2 * AT_ONCE + 4))  # while it is at it
    for _ in range(4):
        counts.append(len(handled))
        await asyncio.sleep(0)
    assert handled == list(range(2 * AT_ONCE + 4))
    assert counts == [AT_ONCE, 2 * AT_ONCE, len(handled), len(handled)]


async def test_the_turns_of_many_are_larger() -> None:
    handled = list[int]()
    in_turns = InTurns(handled.append)
    in_turns.add(range(16 * AT_ONCE))
    assert len(handled) == 2 * AT_ONCE
    in_turns.finish()


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
