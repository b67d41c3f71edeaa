import asyncio

import pytest

from service.execution.paced_handler import MIN_PER_TURN, PacedHandler

pytestmark = pytest.mark.anyio


async def test_many_items_are_handled_in_order_over_several_turns_of_the_event_loop() -> None:
    handled, counts = list[int](), list[int]()
    in_turns = PacedHandler(handled.append)
    in_turns.add(range(2 * MIN_PER_TURN))
    in_turns.add(range(2 * MIN_PER_TURN, 2 * MIN_PER_TURN + 4))  # while earlier items wait
    for _ in range(4):
        counts.append(len(handled))
        await asyncio.sleep(0)
    assert handled == list(range(2 * MIN_PER_TURN + 4))
    assert counts == [MIN_PER_TURN, 2 * MIN_PER_TURN, len(handled), len(handled)]


async def test_a_turn_handles_more_items_when_many_are_waiting() -> None:
    handled = list[int]()
    in_turns = PacedHandler(handled.append)
    in_turns.add(range(16 * MIN_PER_TURN))
    assert len(handled) == 2 * MIN_PER_TURN
    in_turns.finish()


async def test_one_item_is_handled_at_once() -> None:
    handled = list[str]()
    PacedHandler(handled.append).add(["only"])
    assert handled == ["only"]


async def test_finish_handles_all_waiting_items_and_more_can_be_added_afterwards() -> None:
    handled = list[int]()
    in_turns = PacedHandler(handled.append)
    in_turns.add(range(20))
    in_turns.finish()
    assert handled == list(range(20))
    in_turns.add([20])
    assert handled == list(range(21))
    await asyncio.sleep(0)  # the scheduled turn finds no items
    assert handled == list(range(21))
