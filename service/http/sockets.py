"""What a connection's socket tells beside its bytes."""

import asyncio
import socket
import struct
import sys
import time

# Where tcp_info of Linux says how many milliseconds ago something last came. It counts in the kernel's ticks, as does
# CLOCK_MONOTONIC_COARSE, which Python has no name for.
TCP_INFO_BYTES, LAST_RECEIVED_OFFSET = 56, 52
COARSE_CLOCK = 6
TICK_S = time.clock_getres(COARSE_CLOCK) if sys.platform == "linux" else 0.01


def waited_s(transport: asyncio.BaseTransport) -> float:
    """Tell how long what is read now has waited to be read, to a tick and never too long: a busy loop is late."""
    try:
        tcp = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        (waited_ms,) = struct.unpack_from("I", tcp, LAST_RECEIVED_OFFSET)
    except (AttributeError, OSError, struct.error):  # no TCP, or no Linux
        return 0.0
    return max(0.0, float(waited_ms) / 1000 - TICK_S)


def was_reset(transport: asyncio.BaseTransport) -> bool:
    """Tell whether the client has refused what was written to it."""
    return bool(transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
