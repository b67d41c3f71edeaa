from dataclasses import replace

import pytest

from models.subnetwork import SubNetwork
from service.domain import ApiKey, InferenceRequest
from service.errors import UnknownRequestError
from service.recent_answers import RecentAnswers
from tests.service.inference_protocol.answers import NAMES, answer


def asked(image: int = 0, key: str | None = None) -> InferenceRequest:
    return InferenceRequest(0.0, key=None if key is None else ApiKey(key), image=image)


def test_an_answer_is_found_by_its_request_id() -> None:
    answers = RecentAnswers()
    answers.remember("a", asked(), answer(0.2, 0.7, 0.1), NAMES)
    answers.remember("b", asked(), answer(0.7, 0.2, 0.1), NAMES)
    found = answers.find(None, "a", 0)
    assert (found.index, found.label, found.subnetwork, found.expected_top1) == (1, "dog", SubNetwork(4, 0.5), 0.75)
    assert not found.is_judged


def test_each_image_of_a_request_has_its_own_answer() -> None:
    answers = RecentAnswers()
    answers.remember("a", asked(image=1), answer(0.2, 0.7, 0.1), NAMES)
    answers.remember("a", asked(image=0), answer(0.7, 0.2, 0.1), NAMES)
    assert [answers.find(None, "a", image).index for image in (0, 1)] == [0, 1]


def test_a_later_request_with_the_same_id_replaces_the_answer_and_is_not_judged_yet() -> None:
    answers = RecentAnswers()
    answers.remember("a", asked(), answer(0.2, 0.7, 0.1), NAMES)
    answers.find(None, "a", 0).is_judged = True
    answers.remember("a", asked(), answer(0.7, 0.2, 0.1), NAMES)
    assert answers.find(None, "a", 0).index == 0
    assert not answers.find(None, "a", 0).is_judged


def test_the_oldest_answer_is_dropped() -> None:
    answers = RecentAnswers(kept=2)
    for name in ("a", "b", "a", "c"):
        answers.remember(name, asked(), answer(0.2, 0.7, 0.1), NAMES)
    assert answers.find(None, "a", 0)
    assert answers.find(None, "c", 0)
    with pytest.raises(UnknownRequestError, match="only the last 2 answers are"):
        answers.find(None, "b", 0)


def test_an_answer_without_a_request_id_is_not_remembered() -> None:
    answers = RecentAnswers()
    answers.remember(None, asked(), answer(0.2, 0.7, 0.1), NAMES)
    with pytest.raises(UnknownRequestError):
        answers.find(None, "", 0)


def test_an_answer_to_a_request_with_one_key_is_not_found_with_another() -> None:
    answers = RecentAnswers()
    answers.remember("a", asked(key="mine"), answer(0.2, 0.7, 0.1), NAMES)
    answers.remember("a", asked(key="yours"), answer(0.7, 0.2, 0.1), NAMES)
    assert answers.find(ApiKey("mine"), "a", 0).index == 1
    for other in (None, ApiKey("another")):
        with pytest.raises(UnknownRequestError):
            answers.find(other, "a", 0)


def test_the_last_answer_and_the_first_sub_network_of_two_looks_are_remembered() -> None:
    answers, last = RecentAnswers(), answer(0.2, 0.7, 0.1, grid=8)
    first = answer(0.7, 0.2, 0.1, grid=2).looks[0]
    answers.remember("a", asked(), replace(last, looks=(first, *last.looks)), NAMES)
    found = answers.find(None, "a", 0)
    assert (found.index, found.subnetwork) == (1, SubNetwork(2, 0.5))
