"""The delay of the event loop: how late it runs what is due. Every request waits that long, and no queue shows it."""

import asyncio
import time
from collections.abc import Callable

from service.telemetry.instruments import Instruments

INTERVAL_S = 0.25
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class LoopDelay:
    """Measures the delay of the event loop with a timer."""

    def __init__(self, instruments: Instruments, clock: Callable[[], float] = time.monotonic) -> None:
        """Declare the metric.

        Args:
            instruments: declares the metric.
            clock: in seconds. Not the loop's clock, which may stand still while a callback runs.
        """
        self._clock = clock
        self._delay = instruments.histogram(
            "supervit_event_loop_delay_seconds",
            "Delay of the event loop in running a due timer; above some 50 ms, the event loop is overloaded.",
            buckets=BUCKETS_S,
        )

    async def watch(self) -> None:
        """Measure until cancelled."""
        while True:
            due_at = self._clock() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._delay.observe(max(0.0, self._clock() - due_at))
