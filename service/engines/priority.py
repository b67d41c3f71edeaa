"""How work gives way to requests where processors are scarce; it cannot take its priority back."""

import os
import threading
from contextlib import suppress


def use_spare_time() -> None:
    """Give this process only the processor time that no other process wants.

    Never do this to a thread of a server: it might take the interpreter's lock, and then not run for seconds.
    """
    os.nice(19)
    with suppress(AttributeError, OSError):  # on Linux, unless a sandbox forbids it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def give_way(niceness: int) -> None:
    """Give this thread, and the threads that it starts, less of a processor that other threads want as well.

    At a niceness of 10 it gets a tenth, at 19 a sixtieth. A thread that is nicer already keeps its niceness.
    """
    thread = threading.get_native_id()  # on Linux, priorities are those of threads
    if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
