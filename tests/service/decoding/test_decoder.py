import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from service.decoding.decoder import Decoder
from service.errors import DeadlineError, InvalidImageError
from tests.service.conftest import opening

DUE_AT = 1000.0
COST_S = 0.05  # the most that is ordinary


class Slow:
    """Images that are decoded until they are told to end, by a clock that tests move."""

    def __init__(self, threads: int = 2) -> None:
        self.now = 0.0
        self.may_end = threading.Event()
        self.running = threading.Semaphore(0)
        self.order: list[bytes] = []
        self.decoder = Decoder(opening(self.decode, COST_S), threads, 0, lambda: self.now)

    def decode(self, data: bytes) -> torch.Tensor:
        self.order.append(data)
        self.running.release()
        self.may_end.wait(10)
        if data == b"broken":
            raise InvalidImageError("it is broken")
        return torch.zeros(1)


@contextmanager
def slow(threads: int = 2) -> Iterator[Slow]:
    images = Slow(threads)
    try:
        yield images
    finally:
        images.may_end.set()
        images.decoder.close()


def test_images_that_hold_all_threads_for_too_long_are_expected_to_go_on_so() -> None:
    with slow() as images:
        decoder = images.decoder
        futures = [decoder.submit(b"x", DUE_AT)]
        images.running.acquire()
        images.now = 60.0
        assert decoder.queue_s(images.now, DUE_AT) == 0.0, "one of the threads is free"
        futures.append(decoder.submit(b"x", DUE_AT))
        images.running.acquire()
        images.now = 100.0
        expected = pytest.approx(40.0, abs=0.1)
        assert decoder.queue_s(images.now, DUE_AT) == expected, "the one that took less may be the next to end"
        images.may_end.set()
        for future in futures:
            future.result(10)
        assert decoder.queue_s(images.now, DUE_AT) == 0.0


def test_images_that_outlast_their_clients_are_learned_from() -> None:
    with slow() as images:
        future = images.decoder.submit(b"x", DUE_AT)
        images.running.acquire()
        images.now = 0.1
        images.decoder.release(future)
        assert images.decoder.expected_s(images.now) > 0


def test_images_that_take_their_time_are_not_counted_twice() -> None:
    with slow() as images:
        known = images.decoder.submit(b"x", DUE_AT)
        images.running.acquire()
        images.now = 0.1  # twice what its header let expect, which makes the next by a fifth longer
        images.may_end.set()
        assert known.result(10).seconds == 0.1
        images.may_end.clear()
        for _ in range(2):
            images.decoder.submit(b"x", DUE_AT)
            images.running.acquire()
        images.now = 0.12
        assert images.decoder.queue_s(images.now, DUE_AT) == pytest.approx(1.2 * COST_S - 0.02, abs=1e-4)


def test_the_most_urgent_image_is_decoded_first_and_lower_priorities_last() -> None:
    with slow(threads=1) as images:
        decoder = images.decoder
        first = decoder.submit(b"first", 50.0)
        images.running.acquire()
        for data, due_at, priority in ((b"low", 1.0, -1), (b"late", 9.0, 0), (b"lowest", 0.5, -2), (b"soon", 2.0, 0)):
            last = decoder.submit(data, due_at, priority)
        images.may_end.set()
        first.result(10)
        last.result(10)
        decoder.close()
    assert images.order == [b"first", b"soon", b"late", b"low", b"lowest"]


@pytest.mark.parametrize(
    ("due_at", "priority", "before"), [(0.5, 0, 1), (6.5, 0, 2), (99.0, 0, 3), (0.5, -1, 3), (99.0, -1, 4)]
)
def test_an_image_is_expected_to_wait_for_the_more_urgent_ones_alone(due_at: float, priority: int, before: int) -> None:
    with slow(threads=1) as images:
        decoder = images.decoder
        known = decoder.submit(b"x", DUE_AT)
        images.running.acquire()
        images.now = COST_S
        images.may_end.set()
        known.result(10)
        images.may_end.clear()
        decoder.submit(b"x", 5.0)
        images.running.acquire()
        for due in ((6.0, 0), (7.0, 0), (1.0, -1)):
            decoder.submit(b"x", *due)
        decoder.release(decoder.submit(b"gone", 0.1))
        expected = pytest.approx(COST_S + (before - 1) * decoder.expected_s(images.now))
        assert decoder.queue_s(images.now, due_at, priority) == expected


def test_a_cancelled_image_is_never_decoded_and_nothing_waits_behind_it() -> None:
    with slow(threads=1) as images:
        decoder = images.decoder
        first = decoder.submit(b"first", 50.0)
        images.running.acquire()
        gone, last = decoder.submit(b"gone", 1.0), decoder.submit(b"last", 60.0)
        decoder.release(gone)
        images.may_end.set()
        first.result(10)
        last.result(10)
    assert images.order == [b"first", b"last"]
    assert gone.cancelled()


def test_after_its_deadline_an_image_is_not_decoded() -> None:
    with slow() as images:
        images.now = 2.0
        with pytest.raises(DeadlineError):
            images.decoder.submit(b"x", 1.0).result(10)
    assert images.order == []


def test_an_image_that_cannot_be_decoded_says_why_and_is_not_learned_from() -> None:
    with slow() as images:
        images.may_end.set()
        images.now = 3.0
        with pytest.raises(InvalidImageError, match="broken"):
            images.decoder.submit(b"broken", DUE_AT).result(10)
        assert images.decoder.expected_s(images.now) == 0.0
