"""Detects a batch that hangs. Knows no engine: the caller says which batch runs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Watchdog:
    """Decides when a batch counts as hung.

    Attributes:
        interval_s: seconds between two checks.
        hang_s: a batch counts as hung once it has run for this long ...
        hang_ratio: ... and for this many times its expected seconds.
        preparation_s: expected seconds of a step of the preparation before the first request.
    """

    interval_s: float = 1.0
    hang_s: float = 30.0
    hang_ratio: float = 10.0
    preparation_s: float = 30.0

    async def until_hung(
        self, running: Callable[[], tuple[float, float] | None], heartbeat: Callable[[], None]
    ) -> float:
        """Check the engine at every interval until a batch hangs.

        Args:
            running: returns when the current batch began and its expected seconds; None where none runs.
            heartbeat: called at every check, to show that the event loop is alive.

        Returns:
            The expected seconds of the batch that hangs.
        """
        # Checks are counted, not timed: after the whole machine was suspended, the watchdog may be the first to wake.
        batch, looks = None, 0
        while batch is None or looks * self.interval_s < max(self.hang_s, self.hang_ratio * batch[1]):
            heartbeat()
            await asyncio.sleep(self.interval_s)
            last, batch = batch, running()
            looks = looks + 1 if batch == last else 0
        return batch[1]
