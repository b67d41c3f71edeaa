import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engines.priority import give_way


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.parametrize(("before", "asked", "after"), [(0, 12, 12), (15, 10, 15), (15, 0, 15), (15, 19, 19)])
def test_a_thread_gives_way_and_never_takes_priority_back(before: int, asked: int, after: int) -> None:
    """Only the system's administrator may lower the niceness of a thread; for anyone else, that is an error."""
    own = own_niceness()
    with ThreadPoolExecutor(1, initializer=give_way, initargs=(before,)) as thread:
        thread.submit(give_way, asked).result()
        assert thread.submit(own_niceness).result() == max(own, after)
    assert own_niceness() == own
