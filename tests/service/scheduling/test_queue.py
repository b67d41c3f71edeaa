import random

import pytest

from service.scheduling.queue import RequestQueue
from service.scheduling.state import QueuedRequest
from tests.service.granting import constraints_for


def due(deadline_at: float, priority: int = 0) -> QueuedRequest:
    return QueuedRequest(deadline_at, constraints_for(9.0, 2), priority)


def test_a_request_that_has_left_can_no_longer_be_enqueued() -> None:
    """Its image may be decoded just as its client leaves."""
    queue, request = RequestQueue(), due(1.0)
    assert not queue.enqueue(request)
    queue.admit(request)
    assert queue.enqueue(request)
    queue.remove(request)
    assert not queue.enqueue(request)
    assert (len(queue), queue.num_admitted) == (0, 0)


def test_removed_requests_leave_no_priorities_behind() -> None:
    queue = RequestQueue()
    for number in range(1000):
        request = due(1.0, priority=-1000 * number)
        queue.admit(request)
        queue.remove(request)
    assert not queue.priorities


def test_the_queue_stays_consistent_through_random_events_and_ends_empty() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        queue, present = RequestQueue(), list[QueuedRequest]()
        for _ in range(150):
            match rng.choice(("come", "come", "enqueue", "leave")):
                case "come":
                    present.append(due(rng.choice((1.0, 2.0, rng.random())), -rng.randrange(3)))
                    queue.admit(present[-1])
                case "enqueue" if present and (request := rng.choice(present)) not in queue.queued:
                    assert queue.enqueue(request)
                case "leave" if present:
                    queue.remove(present.pop(rng.randrange(len(present))))
            assert queue.num_admitted == len(present)
            assert [one.deadline_at for one in queue.queued] == sorted(one.deadline_at for one in queue.queued)
            assert queue.deadlines_before(due(9.0, -9)) == sorted(one.deadline_at for one in present)
        for request in present:
            queue.remove(request)
        assert (len(queue), queue.num_admitted, queue.priorities) == (0, 0, frozenset())


def test_requests_of_no_lower_priority_and_no_later_deadline_come_before_a_request() -> None:
    queue = RequestQueue()
    for request in (due(1.0), due(2.0, -1), due(3.0), due(0.5, -2)):
        queue.admit(request)
    assert queue.deadlines_before(due(2.0, -1)) == [1.0, 2.0]
    assert queue.deadlines_before(due(9.0)) == [1.0, 3.0]
    assert [queue.count_before(due(*request)) for request in ((2.0, -1), (9.0, 0), (9.0, -2))] == [2, 2, 4]


def test_a_reserved_place_is_kept_until_it_expires() -> None:
    queue, first, second = RequestQueue(), due(1.0), due(2.0, -1)
    queue.reserve(first, 0.5)
    queue.reserve(second, 0.6)
    assert queue.deadlines_before(due(9.0, -1)) == [1.0, 2.0]
    queue.expire_reserved(0.4)
    assert (queue.num_reserved, queue.num_admitted) == (2, 2)
    queue.expire_reserved(0.5)
    assert (queue.num_reserved, queue.num_admitted, queue.priorities) == (1, 1, frozenset((-1,)))
    queue.remove(second)
    queue.expire_reserved(0.6)
    assert (queue.num_reserved, queue.num_admitted) == (0, 0)


def again(request: QueuedRequest) -> QueuedRequest:
    return QueuedRequest(request.deadline_at, request.constraints, request.priority, second_look_of=request)


def test_a_further_look_is_queued_by_deadline_and_does_not_count_as_a_request() -> None:
    queue, first, other = RequestQueue(), due(1.0), due(2.0)
    for request in (first, other):
        queue.admit(request)
    queue.enqueue(other)
    queue.remove(first)  # it ran
    second = again(first)
    queue.enqueue_again(second)
    assert list(queue.queued) == [second, other]
    assert queue.num_admitted == 1
    assert queue.count_before(due(3.0)) == 1, "a request that has an answer keeps no other out"


@pytest.mark.parametrize("by", ["the request", "the look"])
def test_a_further_look_leaves_the_queue_with_its_request(by: str) -> None:
    queue, first = RequestQueue(), due(1.0)
    second = again(first)
    queue.enqueue_again(second)
    queue.remove(first if by == "the request" else second)
    assert list(queue.queued) == []
    queue.remove(second)
    queue.remove(first)
    assert (len(queue), queue.num_admitted) == (0, 0)


def test_a_third_look_replaces_the_second() -> None:
    queue, first = RequestQueue(), due(1.0)
    second, third = again(first), again(first)
    queue.enqueue_again(second)
    queue.remove(second)  # it ran
    queue.enqueue_again(third)
    queue.remove(first)
    assert list(queue.queued) == []
