import asyncio

import pytest

from service.errors import ClientGoneError, InvalidImageError
from service.inference_protocol.image_group import ImageGroup

pytestmark = pytest.mark.anyio


async def wait_in(together: ImageGroup) -> None:
    with together:
        await asyncio.Event().wait()


async def fail_in(together: ImageGroup) -> None:
    with together:
        await asyncio.sleep(0)
        raise InvalidImageError("the second is broken")


async def test_a_failing_image_cancels_the_others_with_the_same_error() -> None:
    together = ImageGroup(None)
    ends = await asyncio.gather(wait_in(together), fail_in(together), wait_in(together), return_exceptions=True)
    assert [str(end) for end in ends] == ["the second is broken"] * 3
    assert all(isinstance(end, InvalidImageError) for end in ends)


async def test_a_task_cancelled_from_outside_stays_cancelled() -> None:
    task = asyncio.create_task(wait_in(ImageGroup(None)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Leaving:
    """A watch of a client that has left: it raises its error only from the first block that ends."""

    def __init__(self) -> None:
        self.errors: list[Exception] = [ClientGoneError("it left")]

    def __enter__(self) -> None:
        """Watch."""

    def __exit__(self, *_: object) -> None:
        if self.errors:
            raise self.errors.pop()


async def test_the_error_of_the_watch_is_the_error_of_every_image() -> None:
    together = ImageGroup(Leaving())
    ends = await asyncio.gather(wait_in(together), fail_in(together), return_exceptions=True)
    assert [type(end) for end in ends] == [ClientGoneError, ClientGoneError]


async def test_an_answered_image_does_not_cancel_the_others() -> None:
    together, goes_on = ImageGroup(None), asyncio.Event()

    async def answer() -> str:
        with together:
            return "answered"

    async def answer_later() -> str:
        with together:
            await goes_on.wait()
        return "later"

    later = asyncio.create_task(answer_later())
    assert await answer() == "answered"
    goes_on.set()
    assert await later == "later"
