import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import cast

import pytest

from service.assembly import ServedModel
from service.errors import NotReadyError
from service.served_models import ServedModels
from tests.service.conftest import stand_in

pytestmark = pytest.mark.anyio


class Model:
    """A model that serves until it is stopped or fails."""

    def __init__(self, name: str) -> None:
        self.name, self.checkpoint = name, stand_in("a", "b")
        self.is_unused, self.has_begun, self.is_abandoned = True, False, False
        self.error: Exception | None = None
        self.learned_of: list[object] = []
        self._ended = asyncio.Event()
        self.batcher = SimpleNamespace(stop=self._ended.set, abandon=self._abandon)

    async def serve(self) -> None:
        self.has_begun = True
        await self._ended.wait()
        if self.error:
            raise self.error

    def take_over(self, other: object) -> None:
        self.learned_of.append(other)

    def fail(self) -> None:
        self.error = RuntimeError("the model fails on every image")
        self._ended.set()

    def _abandon(self) -> None:
        self.is_abandoned = True
        self._ended.set()


def as_served(model: Model) -> ServedModel:
    return cast(ServedModel, model)


class Stage:
    """Two models, the first of which is served."""

    def __init__(self, draw: Callable[[], float] = lambda: 0.0) -> None:
        self.models, self.old, self.new = ServedModels(draw), Model("old"), Model("new")
        self.slept: list[float] = []

    async def begin(self) -> "asyncio.Task[None]":
        self.models.start(as_served(self.old))
        serving = asyncio.create_task(self.models.run())
        await asyncio.sleep(0)
        self.models.begin(as_served(self.new))
        await asyncio.sleep(0)
        return serving

    def names(self) -> list[str]:
        return [cast(Model, model).name for model in self.models.drawn()]

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


async def test_no_model_answers_before_the_first_one_is_served() -> None:
    models = ServedModels()
    assert models.is_empty
    for ask in (lambda: models.main, models.drawn, lambda: models.all):
        with pytest.raises(NotReadyError):
            ask()


async def test_a_candidate_that_has_only_begun_gets_no_requests() -> None:
    stage = Stage()
    serving = await stage.begin()
    assert stage.new.has_begun
    assert stage.names() == ["old"]
    stage.models.stop()
    await serving


async def test_a_candidate_gets_its_share_of_the_requests_and_the_other_model_stays_available() -> None:
    numbers = [0.0, 0.29, 0.31, 0.99]
    stage = Stage(lambda: numbers.pop(0))
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), 0.3)
    assert [stage.names() for _ in range(4)] == [["new", "old"], ["new", "old"], ["old", "new"], ["old", "new"]]
    assert stage.models.main is as_served(stage.old)
    stage.models.try_out(as_served(stage.new), 1.0)
    assert stage.models.main is as_served(stage.new)
    stage.models.drop(as_served(stage.new))
    assert stage.names() == ["old"]
    stage.models.stop()
    await serving


async def test_an_accepted_candidate_is_still_served_after_the_old_model_retires() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), 1.0)
    stage.models.accept(as_served(stage.new))
    assert stage.models.is_accepted(as_served(stage.new))
    await stage.models.retire(as_served(stage.old), stage.sleep)
    await asyncio.sleep(0)
    assert not serving.done()
    assert [cast(Model, model).name for model in stage.models.all] == ["new"]
    stage.models.stop()
    await asyncio.wait_for(serving, 10)


async def test_a_model_retires_only_once_it_has_answered_its_requests() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.old.is_unused = False
    stage.models.try_out(as_served(stage.new), 1.0)
    stage.models.accept(as_served(stage.new))

    async def sleep_and_finish(seconds: float) -> None:
        await stage.sleep(seconds)
        assert not stage.models.has_ended(as_served(stage.old))
        stage.old.is_unused = len(stage.slept) == 3

    finish: Callable[[float], Awaitable[None]] = sleep_and_finish
    await stage.models.retire(as_served(stage.old), finish)
    assert len(stage.slept) == 3
    stage.models.stop()
    await serving


async def test_a_candidate_that_fails_ends_alone_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), 1.0)
    stage.new.fail()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert stage.models.has_ended(as_served(stage.new))
    stage.models.drop(as_served(stage.new))
    await stage.models.retire(as_served(stage.new), stage.sleep)
    assert "fails on every image" in caplog.text
    assert not serving.done()
    stage.models.stop()
    await serving


async def test_the_server_ends_if_the_served_model_fails() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.old.fail()
    with pytest.raises(RuntimeError, match="on every image"):
        await serving
    assert stage.models.has_ended(as_served(stage.new))


async def test_abandon_reaches_every_model() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.abandon()
    await serving
    assert stage.old.is_abandoned
    assert stage.new.is_abandoned


async def test_a_model_that_is_not_being_tried_out_cannot_be_accepted() -> None:
    with pytest.raises(ValueError, match="the model is not being tried out"):
        ServedModels().accept(as_served(Model("new")))


async def test_a_candidate_takes_over_what_the_served_model_has_learned() -> None:
    stage = Stage()
    serving = await stage.begin()
    assert not stage.new.learned_of
    stage.models.try_out(as_served(stage.new), 1.0)
    assert stage.new.learned_of == [stage.old]
    stage.models.stop()
    await serving


@pytest.mark.parametrize("share", [0.9, 1.0])
async def test_a_served_model_that_got_no_requests_learns_from_the_dropped_candidate(share: float) -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), share)
    stage.models.drop(as_served(stage.new))
    assert stage.old.learned_of == [stage.new] * (share == 1.0)
    stage.models.stop()
    await serving


async def test_a_candidate_that_gets_all_requests_replaces_a_served_model_that_fails() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), 1.0)
    stage.old.fail()
    await asyncio.wait([serving], timeout=0.01)
    assert not serving.done()
    assert stage.models.is_accepted(as_served(stage.new))
    stage.models.try_out(as_served(stage.new), 1.0)  # as a model change does that does not know of the failure
    stage.models.accept(as_served(stage.new))
    assert stage.new.learned_of == [stage.old]
    await stage.models.retire(as_served(stage.old), stage.sleep)
    assert stage.names() == ["new"]
    stage.models.stop()
    await asyncio.wait_for(serving, 10)


@pytest.mark.parametrize("share", [0.9, 1.0])
async def test_the_server_ends_if_the_served_model_fails_and_no_candidate_can_replace_it(share: float) -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), share)
    if share == 1.0:
        stage.new.fail()
        await asyncio.sleep(0)
    stage.old.fail()
    with pytest.raises(RuntimeError, match="on every image"):
        await serving
