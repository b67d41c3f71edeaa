"""What the socket of a connection says besides its data."""

import asyncio
import socket
import struct
import sys
import time
from contextlib import suppress

# Where Linux's tcp_info holds the milliseconds since data last arrived. They are counted in the kernel's ticks, as is
# CLOCK_MONOTONIC_COARSE, for which Python has no constant.
TCP_INFO_BYTES, LAST_RECEIVED_OFFSET = 56, 52
CLOCK_MONOTONIC_COARSE = 6
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # a write that no client minds, and that one which has left resets
LONGEST_TICK_S, SHORTEST_TICK_S = 0.01, 0.001


def _tick_s() -> float:
    with suppress(OSError):  # a sandbox may forbid it
        if sys.platform == "linux":
            return min(LONGEST_TICK_S, max(SHORTEST_TICK_S, time.clock_getres(CLOCK_MONOTONIC_COARSE)))
    return LONGEST_TICK_S


TICK_S = _tick_s()


def waited_s(transport: asyncio.BaseTransport) -> float:
    """Return how long the data read now has waited for a busy event loop, to within a tick and never too long."""
    try:
        tcp = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        (waited_ms,) = struct.unpack_from("I", tcp, LAST_RECEIVED_OFFSET)
    except (AttributeError, OSError, struct.error):  # no TCP, or no Linux
        return 0.0
    return max(0.0, float(waited_ms) / 1000 - TICK_S)


def was_reset(transport: asyncio.BaseTransport) -> bool:
    """Return whether the client has reset the connection after a write."""
    return bool(transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
