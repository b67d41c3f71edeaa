import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from service.decoding import Decoder, Decoding


class Slow:
    """Decodings that last until they are told to end, by a clock that tests move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.may_end = threading.Event()
        self.running = threading.Semaphore(0)
        self.decoder = Decoder(self.decode, 2, lambda: self.now)

    def decode(self, _: bytes) -> torch.Tensor:
        self.running.release()
        self.may_end.wait(10)
        return torch.zeros(1)

    def start(self, threads: ThreadPoolExecutor) -> Decoding:
        """Begin a decoding on one of the threads."""
        decoding = self.decoder.prepare(1000.0).submitted(b"x")
        threads.submit(decoding)
        self.running.acquire()
        return decoding


def test_images_that_hold_all_threads_for_too_long_are_expected_to_go_on_so() -> None:
    slow = Slow()
    with ThreadPoolExecutor(2) as threads:
        first = slow.start(threads)
        slow.now = 60.0
        assert slow.decoder.queue_s(slow.now) == 0.0, "one of the threads is free"
        second = slow.start(threads)
        slow.now = 100.0
        assert slow.decoder.queue_s(slow.now) == pytest.approx(40.0), "the one that took less may be the next to end"
        slow.may_end.set()
    for decoding in (first, second):
        slow.decoder.over(decoding)
    assert slow.decoder.queue_s(slow.now) == 0.0


def test_images_that_outlast_their_clients_are_learned_from() -> None:
    slow = Slow()
    with ThreadPoolExecutor(2) as threads:
        decoding = slow.start(threads)
        slow.now = 0.1
        slow.decoder.over(decoding)
        assert slow.decoder.expected_s(slow.now) > 0
        slow.may_end.set()


def test_images_that_take_their_time_are_not_counted_twice() -> None:
    slow = Slow()
    with ThreadPoolExecutor(2) as threads:
        known = slow.start(threads)
        slow.now = 10.0
        slow.may_end.set()
    slow.decoder.over(known)
    slow.may_end.clear()
    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            slow.start(threads)
        slow.now = 10.2
        assert slow.decoder.queue_s(slow.now) == pytest.approx(slow.decoder.expected_s(slow.now) / 2)
        slow.may_end.set()
