import asyncio
import json
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidParameterError
from service.http.large_json import MAX_DEPTH, MAX_LISTS, MAX_MEMBERS, PIECE_BYTES, take_numbers

pytestmark = pytest.mark.anyio

PIXELS = np.linspace(0, 1, 24).reshape(2, 3, 2, 2)


async def taken(value: object, **options: Any) -> tuple[Any, list[list[float]]]:  # noqa: ANN401 - JSON
    rest, numbers = await take_numbers(json.dumps(value, **options).encode(), ("data", "values"))
    return json.loads(rest), [np.asarray(each).tolist() for each in numbers]


@pytest.mark.parametrize("data", [PIXELS.ravel().tolist(), PIXELS.tolist()])
async def test_lists_of_numbers_are_extracted_flat_and_in_order(data: object) -> None:
    rest, numbers = await taken({"a": 1, "data": data, "b": [{"values": [1, -2.5e3]}]})
    assert rest == {"a": 1, "data": [], "b": [{"values": []}]}
    assert numbers == [PIXELS.ravel().tolist(), [1, -2500]]


@pytest.mark.parametrize("indent", [1, "\t"])
async def test_lists_may_have_white_space_between_their_brackets(indent: int | str) -> None:
    rest, numbers = await taken({"data": PIXELS[None].tolist(), "b": [{"values": [[1], [2]]}]}, indent=indent)
    assert rest == {"data": [], "b": [{"values": []}]}
    assert numbers == [PIXELS.ravel().tolist(), [1, 2]]


async def test_lists_nested_deeper_than_any_tensor_are_left_in_place() -> None:
    deep = [1]
    for _ in range(MAX_DEPTH):
        deep = [deep]  # type: ignore[list-item]
    assert await taken({"data": deep}) == ({"data": deep}, [])


async def test_a_list_that_spans_many_pieces_is_extracted_whole() -> None:
    many = [index / 7 for index in range(PIECE_BYTES)]
    assert (await taken({"data": many}))[1] == [many]


async def test_the_event_loop_runs_between_two_pieces() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await taken({"data": [0.125] * PIECE_BYTES})
    counting.cancel()
    assert turns >= 7  # a number, its comma and a space take 7 bytes


@pytest.mark.parametrize(
    "value", [{"data": ["text, [1"]}, {"other": [1, 2]}, {"x": '"data": [1]'}, {"data": {"data": 7}}]
)
async def test_anything_but_a_list_of_numbers_is_left_in_place(value: object) -> None:
    assert await taken(value) == (value, [])


@pytest.mark.parametrize("text", [b'{"data": [1, x]}', b'{"data": [1,,2]}', b'{"data": [NaN]}', b'{"data": [{}]}'])
async def test_a_list_with_anything_but_numbers_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidParameterError, match="must be valid JSON numbers"):
        await take_numbers(text, ("data",))


async def test_a_body_with_too_many_other_members_is_refused() -> None:
    every: tuple[list[Any], ...] = ([[]] * MAX_MEMBERS, [{}] * MAX_MEMBERS, [1] * (MAX_MEMBERS + 1))
    for many in every:
        with pytest.raises(InvalidParameterError, match="at most 1024 members"):
            await taken({"other": many})


async def test_the_search_for_the_ends_of_lists_is_bounded() -> None:
    searched = b'{"data":["' * 200_000  # unbounded, each of them would be searched for its end in all that follows
    with pytest.raises(InvalidParameterError):
        await asyncio.wait_for(take_numbers(searched, ("data",)), 5)
    rest, numbers = await taken([{"data": [1]}] * (MAX_LISTS + 1))
    assert len(numbers) == MAX_LISTS
    assert rest[-1] == {"data": [1]}
