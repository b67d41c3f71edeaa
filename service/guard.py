"""Watches that a batch comes to an end. Knows of no engine: it is told what runs."""

import asyncio
from collections.abc import Callable

GUARD_INTERVAL_S = 1.0
HANG_S, HANG_RATIO = 30.0, 10  # a batch that takes so long, and so many times what it should, is taken to hang


async def until_hung(running: Callable[[], tuple[float, float] | None], heartbeat: Callable[[], None]) -> float:
    """Look at the engine every second until it hangs.

    Args:
        running: tells when the batch that runs began, and the seconds it should take; None where none runs.
        heartbeat: called with every look, to show that the event loop is alive.

    Returns:
        The seconds that the batch which does not end should have taken.
    """
    batch, looks = None, 0  # counted, not timed: when the whole machine has been asleep, this may be first to wake
    while batch is None or looks * GUARD_INTERVAL_S < max(HANG_S, HANG_RATIO * batch[1]):
        heartbeat()
        await asyncio.sleep(GUARD_INTERVAL_S)
        last, batch = batch, running()
        looks = looks + 1 if batch == last else 0
    return batch[1]
