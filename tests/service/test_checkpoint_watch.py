import asyncio
import os
from pathlib import Path

import pytest

from service.access.watched_files import CHECK_S, WatchedFiles
from service.checkpoint_watch import LEVEL_LOOKS, follow
from service.errors import ModelChangeError
from service.model_change import ModelChange

pytestmark = pytest.mark.anyio


class Watch:
    """Looks at a file whenever a test lets time go by."""

    def __init__(self, path: Path) -> None:
        self.path, self.now, self.asked = path, 0.0, list[ModelChange]()
        self.error: Exception | None = None
        self.looks = asyncio.Semaphore(0)
        self.has_looked = asyncio.Event()
        path.write_text("first")
        files = WatchedFiles([path], lambda: self.now)
        self.task = asyncio.create_task(follow(path, self.begin, files, self.sleep))

    def begin(self, change: ModelChange) -> None:
        self.asked.append(change)
        if self.error:
            raise self.error

    async def sleep(self, seconds: float) -> None:
        self.has_looked.set()
        await self.looks.acquire()
        self.now += seconds

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            await self.has_looked.wait()
            self.has_looked.clear()
            self.looks.release()
            await self.has_looked.wait()

    def write(self, text: str) -> None:
        self.path.write_text(text)
        os.utime(self.path, (self.now + 1000, self.now + 1000))


@pytest.fixture
async def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path / "checkpoint.safetensors")


async def test_a_file_that_stays_as_it_is_changes_nothing(watch: Watch) -> None:
    await watch.look(10)
    assert watch.now == 10 * CHECK_S
    assert watch.asked == []


async def test_a_file_that_is_replaced_is_served_once_it_is_level(watch: Watch) -> None:
    watch.write("second")
    await watch.look(LEVEL_LOOKS)
    assert watch.asked == []
    await watch.look()
    assert watch.asked == [ModelChange(str(watch.path))]
    await watch.look(10)
    assert len(watch.asked) == 1


async def test_a_file_that_is_still_being_written_is_waited_for(watch: Watch) -> None:
    for length in range(1, 6):
        watch.write("x" * length)
        await watch.look(LEVEL_LOOKS)
    assert watch.asked == []
    await watch.look()
    assert len(watch.asked) == 1


async def test_what_cannot_be_begun_yet_is_tried_again(watch: Watch) -> None:
    watch.error = ModelChangeError("another change goes on")
    watch.write("second")
    await watch.look(LEVEL_LOOKS + 3)
    assert len(watch.asked) == 3
    watch.error = None
    await watch.look(3)
    assert len(watch.asked) == 4


async def test_a_file_that_is_taken_away_is_asked_for_once_it_is_back(watch: Watch) -> None:
    watch.path.unlink()
    await watch.look()
    watch.write("second")
    await watch.look(LEVEL_LOOKS + 1)
    assert len(watch.asked) == 1
