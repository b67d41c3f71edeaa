import asyncio
import os
from pathlib import Path

import pytest

from models.checkpoint import digest
from service.access.watched_files import CHECK_S
from service.checkpoint_watch import STABLE_CHECKS, CheckpointWatch, follow
from service.errors import ModelChangeError
from service.model_change import ModelChange

pytestmark = pytest.mark.anyio


class Watch:
    """A watch that checks its file whenever a test lets time pass."""

    def __init__(self, path: Path, open_error: Exception | None = None) -> None:
        self.path, self.now, self.asked = path, 0.0, list[ModelChange]()
        self.error: Exception | None = None
        self.open_error = open_error
        self.looks = asyncio.Semaphore(0)
        self.has_looked = asyncio.Event()
        path.write_text("first")
        self.version = digest(path)
        self.task = asyncio.create_task(follow("checkpoint", self.open, self.sleep))

    def open(self) -> CheckpointWatch:
        if self.open_error:
            raise self.open_error
        return CheckpointWatch(self.path, self.version, self.begin)

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


async def test_an_unchanged_file_begins_no_model_change(watch: Watch) -> None:
    await watch.look(10)
    assert watch.now == 10 * CHECK_S
    assert watch.asked == []


async def test_a_replaced_file_is_served_once_it_stops_changing(watch: Watch) -> None:
    await watch.look()
    watch.write("second")
    await watch.look(STABLE_CHECKS)
    assert watch.asked == []
    await watch.look()
    assert watch.asked == [ModelChange(str(watch.path))]
    await watch.look(10)
    assert len(watch.asked) == 1


async def test_a_file_that_was_replaced_before_the_watch_began_is_served(watch: Watch) -> None:
    watch.write("second")  # after the model was read and before the first check
    await watch.look(STABLE_CHECKS + 10)
    assert watch.asked == [ModelChange(str(watch.path))]


async def test_a_file_that_is_still_being_written_is_not_served_yet(watch: Watch) -> None:
    await watch.look()
    for length in range(1, 6):
        watch.write("x" * length)
        await watch.look(STABLE_CHECKS)
    assert watch.asked == []
    await watch.look()
    assert len(watch.asked) == 1


async def test_a_refused_model_change_is_tried_again(watch: Watch) -> None:
    await watch.look()
    watch.error = ModelChangeError("another change goes on")
    watch.write("second")
    await watch.look(STABLE_CHECKS + 3)
    assert len(watch.asked) == 3
    watch.error = None
    await watch.look(3)
    assert len(watch.asked) == 4


async def test_a_removed_file_is_served_once_it_is_back(watch: Watch) -> None:
    await watch.look()
    watch.path.unlink()
    await watch.look()
    watch.write("second")
    await watch.look(STABLE_CHECKS + 1)
    assert len(watch.asked) == 1


async def test_a_missing_file_is_looked_for_until_it_is_found_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(tmp_path / "checkpoint.safetensors", RuntimeError("no hub answers"))
    await watch.look(5)
    assert [record.getMessage() for record in caplog.records] == [
        "the file of checkpoint cannot be watched; trying again: no hub answers"
    ]
    watch.open_error = None
    watch.write("second")
    await watch.look(STABLE_CHECKS + 2)
    assert watch.asked == [ModelChange(str(watch.path))]


async def test_a_watch_continues_after_any_error_and_logs_consecutive_errors_once(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    await watch.look()
    for text in ("second", "third"):
        watch.error = KeyError("a bug")
        watch.write(text)
        await watch.look(2 * STABLE_CHECKS + 6)
        watch.error = None
        await watch.look(4)
    assert not watch.task.done()
    assert [record.getMessage() for record in caplog.records if "cannot be watched" in record.getMessage()] == [
        "the file of checkpoint cannot be watched; trying again: 'a bug'"
    ] * 2
