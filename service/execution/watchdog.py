"""Watches that a batch comes to an end. Knows of no engine: it is told what runs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Watchdog:
    """When an engine is taken to hang.

    Attributes:
        interval_s: between two looks.
        hang_s: a batch that takes so long ...
        hang_ratio: ... and so many times what it should is taken to hang.
        preparation_s: what a step of the preparation before the first request should take.
    """

    interval_s: float = 1.0
    hang_s: float = 30.0
    hang_ratio: float = 10.0
    preparation_s: float = 30.0

    async def until_hung(
        self, running: Callable[[], tuple[float, float] | None], heartbeat: Callable[[], None]
    ) -> float:
        """Look at the engine at every interval until it hangs.

        Args:
            running: tells when the batch that runs began, and the seconds it should take; None where none runs.
            heartbeat: called with every look, to show that the event loop is alive.

        Returns:
            The seconds that the batch which does not end should have taken.
        """
        # Looks are counted, not timed: when the whole machine has been asleep, this may be first to wake.
        batch, looks = None, 0
        while batch is None or looks * self.interval_s < max(self.hang_s, self.hang_ratio * batch[1]):
            heartbeat()
            await asyncio.sleep(self.interval_s)
            last, batch = batch, running()
            looks = looks + 1 if batch == last else 0
        return batch[1]
