import gc
import math
import random
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

import pytest
import torch

from service.decoding.decoder import DecodedImage, Decoder
from service.decoding.images import OpenedImage
from service.decoding.times import DecodeTimes
from service.errors import DeadlineError, InvalidImageError, NotReadyError, OverloadedError
from tests.service.conftest import opening

DUE_AT = 1000.0
COST_S = 0.05  # the highest cost of an ordinary image


class Slow:
    """A decoder whose images finish when the test says so, with a clock that the test moves."""

    def __init__(self, threads: int = 2) -> None:
        self.now = 0.0
        self.may_end = threading.Event()
        self.running = threading.Semaphore(0)
        self.order: list[bytes] = []
        self.decoder = Decoder(opening(self.decode, COST_S), threads, 0, clock=lambda: self.now)

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


@pytest.mark.parametrize("data", [b"fine", b"broken"])
def test_an_image_is_freed_with_its_future_without_the_garbage_collector(data: bytes) -> None:
    held: list[weakref.ref[object]] = []

    class Opened(OpenedImage):
        """An opened image that can be referred to weakly."""

    def open_image(data: bytes) -> OpenedImage:
        def decode() -> torch.Tensor:
            if data == b"broken":
                raise InvalidImageError("it is broken")
            return torch.zeros(1)

        opened = Opened("jpeg", COST_S, 0, decode)
        held.append(weakref.ref(opened))
        return opened

    decoder = Decoder(open_image, 1, 0)
    gc.disable()
    try:
        wait([decoder.submit(data, math.inf)])
        wait([decoder.submit(b"next", math.inf)])  # by now the only thread has forgotten the first
        assert held[0]() is None
    finally:
        gc.enable()
        decoder.close()


def test_images_past_their_expected_time_are_expected_to_need_as_many_seconds_more() -> None:
    with slow() as images:
        decoder = images.decoder
        futures = [decoder.submit(b"x", DUE_AT)]
        images.running.acquire()
        images.now = 60.0
        assert decoder.queue_s(images.now, DUE_AT) == 0.0, "one of the threads is idle"
        futures.append(decoder.submit(b"x", DUE_AT))
        images.running.acquire()
        images.now = 100.0
        expected = pytest.approx(40.0, abs=0.1)
        assert decoder.queue_s(images.now, DUE_AT) == expected, "the image that has run for less time may end first"
        images.may_end.set()
        for future in futures:
            future.result(10)
        assert decoder.queue_s(images.now, DUE_AT) == 0.0


def test_pixels_that_need_no_codec_are_queued_by_urgency_like_files() -> None:
    with slow(threads=1) as images:
        images.decoder.submit(b"first", DUE_AT)
        images.running.acquire()
        pixels = OpenedImage("UINT8", COST_S, 0, lambda: images.decode(b"pixels"))
        ends = [images.decoder.submit(data, DUE_AT + later) for data, later in ((pixels, 2), (b"file", 1))]
        images.may_end.set()
        assert [isinstance(end.result(10), DecodedImage) for end in ends] == [True, True]
        assert images.order == [b"first", b"file", b"pixels"]


def test_the_decode_time_of_a_running_image_is_learned_once_when_its_request_releases_it() -> None:
    with slow() as images:
        future = images.decoder.submit(b"x", DUE_AT)
        images.running.acquire()
        images.now = 0.1
        images.decoder.release(future)
        learned_s = images.decoder.expected_s(images.now)
        assert learned_s > 0
        images.may_end.set()
        future.result(10)
        assert images.decoder.expected_s(images.now) == learned_s


def test_the_elapsed_time_of_running_images_is_subtracted_from_the_expected_wait() -> None:
    with slow() as images:
        known = images.decoder.submit(b"x", DUE_AT)
        images.running.acquire()
        images.now = 0.1  # twice the expected time, which raises the next estimate by a fifth
        images.may_end.set()
        assert known.result(10).seconds == 0.1
        images.may_end.clear()
        for _ in range(2):
            images.decoder.submit(b"x", DUE_AT)
            images.running.acquire()
        images.now = 0.12
        assert images.decoder.queue_s(images.now, DUE_AT) == pytest.approx(1.2 * COST_S - 0.02, abs=1e-4)


def test_a_decoder_that_takes_over_adopts_the_learned_decode_times() -> None:
    with slow() as before, slow(threads=1) as after:
        known = before.decoder.submit(b"x", DUE_AT)
        before.running.acquire()
        before.now = after.now = 0.1  # twice the expected time, as above
        before.may_end.set()
        known.result(10)
        after.decoder.take_over(before.decoder)
        assert after.decoder.expected_s(0.1) == before.decoder.expected_s(0.1) > 0
        after.decoder.submit(b"x", DUE_AT)
        after.running.acquire()
        assert after.decoder.queue_s(0.1, DUE_AT) == pytest.approx(1.2 * COST_S, abs=1e-4)


def test_the_most_urgent_image_is_decoded_first_and_lower_priorities_last() -> None:
    with slow(threads=1) as images:
        decoder = images.decoder
        submitted = [decoder.submit(b"first", 50.0)]
        images.running.acquire()
        for data, due_at, priority in ((b"low", 1.0, -1), (b"late", 9.0, 0), (b"lowest", 0.5, -2), (b"soon", 2.0, 0)):
            submitted.append(decoder.submit(data, due_at, priority))
        images.may_end.set()
        for each in submitted:
            each.result(10)
    assert images.order == [b"first", b"soon", b"late", b"low", b"lowest"]


@pytest.mark.parametrize(
    ("due_at", "priority", "before"), [(0.5, 0, 1), (6.5, 0, 2), (99.0, 0, 3), (0.5, -1, 3), (99.0, -1, 4)]
)
def test_an_image_is_expected_to_wait_only_for_more_urgent_ones(due_at: float, priority: int, before: int) -> None:
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


def test_an_image_is_not_decoded_after_its_deadline() -> None:
    with slow() as images:
        images.now = 2.0
        with pytest.raises(DeadlineError):
            images.decoder.submit(b"x", 1.0).result(10)
    assert images.order == []


def test_a_broken_image_raises_its_error_and_its_decode_time_is_not_learned() -> None:
    with slow() as images:
        broken = images.decoder.submit(b"broken", DUE_AT)
        images.running.acquire()
        images.now = 3.0
        images.may_end.set()
        with pytest.raises(InvalidImageError, match="broken"):
            broken.result(10)
        assert images.decoder.expected_s(images.now) == 0.0


class Mixed:
    """A decoder of ordinary (lower-case) and expensive (upper-case) images, which finish when the test says so."""

    def __init__(self, threads: int, max_memory_bytes: int, max_s_per_address: float) -> None:
        self.now = 0.0
        self.gates: dict[bytes, threading.Event] = {}
        self.started = threading.Semaphore(0)
        self.order: list[bytes] = []
        self.decoder = Decoder(self.open, threads, max_memory_bytes, max_s_per_address, lambda: self.now)

    def submit(
        self, data: bytes, deadline_at: float = DUE_AT, priority: int = 0, address: str | None = None
    ) -> "Future[DecodedImage]":
        self.gates[data] = threading.Event()
        return self.decoder.submit(data, deadline_at, priority, address)

    def open(self, data: bytes) -> OpenedImage:
        is_expensive = data.isupper()
        return OpenedImage(
            "expensive" if is_expensive else "ordinary",
            20 * COST_S if is_expensive else COST_S,
            100 if is_expensive else 1,
            lambda: self.decode(data),
        )

    def decode(self, data: bytes) -> torch.Tensor:
        self.order.append(data)
        self.started.release()
        self.gates[data].wait(10)
        return torch.zeros(1)

    def await_started(self, count: int) -> None:
        for _ in range(count):
            assert self.started.acquire(timeout=10)


@contextmanager
def mixed(threads: int, max_memory_bytes: int = 1000, max_s_per_address: float = DUE_AT) -> Iterator[Mixed]:
    images = Mixed(threads, max_memory_bytes, max_s_per_address)
    try:
        yield images
    finally:
        for gate in images.gates.values():
            gate.set()
        images.decoder.close()


def test_an_address_may_not_exceed_its_share_of_expensive_images_while_others_have_some() -> None:
    with mixed(2, max_s_per_address=1.5) as images:
        own = [images.submit(data, address="1.2.3.4") for data in (b"A", b"B")]  # a second each
        images.await_started(1)
        others = [images.submit(b"D", address="5.6.7.8"), images.submit(b"E")]
        with pytest.raises(OverloadedError, match="already take 2 s to decode") as caught:
            images.submit(b"C", address="1.2.3.4").result(10)
        assert caught.value.details == {"reason": "address", "retry_after_s": 1.5}
        others.append(images.submit(b"a", address="1.2.3.4"))
        for gate in images.gates.values():
            gate.set()
        for future in (*own, *others):
            future.result(10)
        images.submit(b"E")
        again = images.submit(b"C", address="1.2.3.4")
        for gate in images.gates.values():
            gate.set()
        again.result(10)


def test_the_share_bounds_neither_the_only_address_nor_the_only_image_of_an_address() -> None:
    with mixed(2, max_s_per_address=0.5) as images:
        futures = [images.submit(data, address="1.2.3.4") for data in (b"A", b"B", b"C")]
        futures.append(images.submit(b"D", address="5.6.7.8"))
        for gate in images.gates.values():
            gate.set()
        for future in futures:
            future.result(10)


@pytest.mark.parametrize("threads", [2, 3])
def test_expensive_images_never_hold_every_thread(threads: int) -> None:
    with mixed(threads) as images:
        for data in (b"A", b"B", b"C", b"D"):
            images.submit(data, 1.0)
        images.await_started(threads - 1)
        ordinary = images.submit(b"a", DUE_AT)
        images.await_started(1)
        assert images.order[-1] == b"a"
        images.gates[b"a"].set()
        assert ordinary.result(10).waited_s == 0.0
        images.gates[b"A"].set()
        images.await_started(1)
        assert images.order[-1].isupper(), "the next expensive image runs once another has ended"
        assert len(images.order) == threads + 1


def test_expensive_images_are_decoded_even_by_a_single_thread() -> None:
    with mixed(1) as images:
        futures = [images.submit(data) for data in (b"A", b"B")]
        for gate in images.gates.values():
            gate.set()
        assert [future.result(10).image.shape for future in futures] == [(1,), (1,)]


def test_expensive_images_share_a_memory_budget() -> None:
    with mixed(4, max_memory_bytes=250) as images:
        for data in (b"A", b"B", b"C"):
            images.submit(data)
        images.await_started(2)
        images.submit(b"a")
        images.await_started(1)
        assert images.order[-1] == b"a", "with a third, the expensive images would take 300 bytes"
        images.gates[b"A"].set()
        images.await_started(1)
        assert images.order[-1] == b"C"


def test_an_expensive_image_over_the_memory_budget_is_decoded_while_no_other_one_is() -> None:
    with mixed(3, max_memory_bytes=10) as images:
        images.submit(b"A")
        images.await_started(1)
        images.submit(b"B", 1.0)
        images.submit(b"a")
        images.await_started(1)
        assert images.order == [b"A", b"a"]
        images.gates[b"A"].set()
        images.await_started(1)
        assert images.order[-1] == b"B"


def test_an_ordinary_image_is_expected_to_wait_for_expensive_ones_only_with_a_single_thread() -> None:
    for threads, waits in ((1, True), (2, False)):
        with mixed(threads) as images:
            for data in (b"A", b"B", b"C"):
                images.submit(data)
            images.await_started(1)
            assert (images.decoder.queue_s(images.now, DUE_AT) > 0) == waits


def test_decode_times_are_learned_per_kind_of_image() -> None:
    times = DecodeTimes()
    assert times.expected_s("PNG", 2.0, 0.0) == 2.0
    for _ in range(50):
        times.observe("PNG", 0.1, 0.3, 1.0)
    assert times.expected_s("PNG", 2.0, 1.0) == pytest.approx(6.0, rel=1e-3)
    assert times.expected_s("JPEG", 2.0, 1.0) == 2.0
    assert times.expected_s("PNG", 2.0, 1000.0) == pytest.approx(2.0), "without new observations, the factor fades"


def test_an_expensive_image_that_would_miss_its_deadline_is_not_decoded() -> None:
    with mixed(2) as images:
        with pytest.raises(DeadlineError, match="would take longer than its deadline allows"):
            images.submit(b"A", 20 * COST_S / 2 - 0.01).result(10)
        assert images.order == []
        future = images.submit(b"B", 20 * COST_S / 2 + 0.01)
        images.await_started(1)
        images.gates[b"B"].set()
        assert future.result(10)


def test_expensive_images_do_not_raise_the_expected_decode_time_of_ordinary_ones() -> None:
    with mixed(2) as images:
        future = images.submit(b"A")
        images.await_started(1)
        images.now = 1.0
        images.gates[b"A"].set()
        assert future.result(10).seconds == 1.0
        assert images.decoder.expected_s(images.now) == 0.0


def test_concurrent_submits_releases_and_queries_do_not_fail() -> None:
    """Eight threads submit, query and release images while others are decoded."""
    kinds = {b"a": COST_S, b"A": 20 * COST_S}
    decoder = Decoder(
        lambda data: OpenedImage(data.decode(), kinds[data], 1, lambda: torch.zeros(1)), 4, 2, clock=time.monotonic
    )
    wrong: list[BaseException] = []
    begin = threading.Barrier(8)

    def hammer(seed: int) -> None:
        rng = random.Random(seed)
        begin.wait(10)
        try:
            for _ in range(300):
                now = time.monotonic()
                future = decoder.submit(rng.choice([b"a", b"A"]), now + 1000 * rng.random(), -rng.randrange(2))
                assert decoder.queue_s(now, now + 1000 * rng.random(), -rng.randrange(2)) >= 0
                assert decoder.expected_s(now) >= 0
                if rng.random() < 0.5:
                    decoder.release(future)
                else:
                    future.result(30)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
        decoder.close()
    assert wrong == []
    assert decoder.queue_s(time.monotonic(), 0.0) == 0.0, "no image is left in the queue"


def test_closing_waits_for_no_image_and_drops_none() -> None:
    may_end = threading.Event()

    def decode(_: bytes) -> torch.Tensor:
        assert may_end.wait(10)
        return torch.zeros(3, 2, 2, dtype=torch.uint8)

    decoder = Decoder(opening(decode), 1, 10**9)
    images = [decoder.submit(b"", time.monotonic() + 60) for _ in range(2)]
    decoder.close()  # called on the event loop, which it must not block
    assert not images[0].done()
    may_end.set()
    assert [image.result(10).image.shape for image in images] == [(3, 2, 2)] * 2


def test_several_threads_decode_a_burst_whose_headers_one_thread_reads() -> None:
    names, all_running = set[str](), threading.Barrier(2, timeout=10)

    def decode(_: bytes) -> torch.Tensor:
        names.add(threading.current_thread().name)
        all_running.wait()
        return torch.zeros(1)

    opened = threading.Semaphore(0)

    def open_slowly(data: bytes) -> OpenedImage:
        opened.acquire()  # until all images are queued, so that one thread takes them all
        return opening(decode)(data)

    decoder = Decoder(open_slowly, 2, 0)
    first = decoder.submit(b"x", DUE_AT + time.monotonic())
    others = [decoder.submit(b"x", DUE_AT + time.monotonic()) for _ in range(3)]
    for _ in range(4):
        opened.release()
    for future in (first, *others):
        future.result(10)
    assert len(names) == 2
    decoder.close()


def test_a_closed_decoder_refuses_images() -> None:
    with slow() as images:
        images.decoder.close()
        with pytest.raises(NotReadyError, match="the server is stopping"):
            images.decoder.submit(b"x", DUE_AT)
        assert images.decoder.queue_s(images.now, DUE_AT) == 0.0


def test_an_old_decode_time_does_not_come_back_with_the_next_image() -> None:
    times = DecodeTimes()
    for _ in range(50):
        times.observe("PNG", 0.01, 0.5, 0.0)
    assert times.expected_s("PNG", 0.01, 0.0) > 0.4
    times.observe("PNG", 0.01, 0.01, 120.0)
    assert times.expected_s("PNG", 0.01, 120.0) < 0.012
