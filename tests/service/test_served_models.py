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
    """Serves until it is stopped, or fails."""

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


async def test_before_the_first_there_is_none() -> None:
    models = ServedModels()
    assert models.is_empty
    for ask in (lambda: models.main, models.drawn, lambda: models.all):
        with pytest.raises(NotReadyError):
            ask()


async def test_a_model_that_has_only_begun_gets_no_requests() -> None:
    stage = Stage()
    serving = await stage.begin()
    assert stage.new.has_begun
    assert stage.names() == ["old"]
    stage.models.stop()
    await serving


async def test_a_share_of_the_requests_goes_to_what_is_tried_out_and_the_other_is_there_for_those_that_name_it() -> (
    None
):
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


async def test_what_is_accepted_is_served_on_when_the_old_one_is_let_go() -> None:
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


async def test_a_model_is_let_go_once_it_has_done_with_its_requests() -> None:
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


async def test_a_model_that_is_tried_out_and_fails_ends_alone_and_the_log_says_why(
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


async def test_the_server_ends_with_the_model_that_is_served() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.old.fail()
    with pytest.raises(RuntimeError, match="on every image"):
        await serving
    assert stage.models.has_ended(as_served(stage.new))


async def test_all_requests_are_answered_where_the_engine_never_comes_back() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.abandon()
    await serving
    assert stage.old.is_abandoned
    assert stage.new.is_abandoned


async def test_nothing_is_accepted_that_is_not_tried_out() -> None:
    with pytest.raises(ValueError, match="the model is not being tried out"):
        ServedModels().accept(as_served(Model("new")))


async def test_a_model_that_gets_requests_goes_on_from_what_the_one_before_has_learned() -> None:
    stage = Stage()
    serving = await stage.begin()
    assert not stage.new.learned_of
    stage.models.try_out(as_served(stage.new), 1.0)
    assert stage.new.learned_of == [stage.old]
    stage.models.stop()
    await serving


@pytest.mark.parametrize("share", [0.9, 1.0])
async def test_a_model_that_comes_back_after_a_while_without_requests_has_missed_nothing(share: float) -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), share)
    stage.models.drop(as_served(stage.new))
    assert stage.old.learned_of == [stage.new] * (share == 1.0)
    stage.models.stop()
    await serving


async def test_a_model_that_fails_gives_its_place_to_the_one_that_answers_all_requests() -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), 1.0)
    stage.old.fail()
    await asyncio.wait([serving], timeout=0.01)
    assert not serving.done()
    assert stage.models.is_accepted(as_served(stage.new))
    stage.models.try_out(as_served(stage.new), 1.0)  # as the change does, which has not heard of it
    stage.models.accept(as_served(stage.new))
    assert stage.new.learned_of == [stage.old]
    await stage.models.retire(as_served(stage.old), stage.sleep)
    assert stage.names() == ["new"]
    stage.models.stop()
    await asyncio.wait_for(serving, 10)


@pytest.mark.parametrize("share", [0.9, 1.0])
async def test_the_server_ends_with_the_model_that_is_served_where_no_other_can_take_its_place(share: float) -> None:
    stage = Stage()
    serving = await stage.begin()
    stage.models.try_out(as_served(stage.new), share)
    if share == 1.0:
        stage.new.fail()
        await asyncio.sleep(0)
    stage.old.fail()
    with pytest.raises(RuntimeError, match="on every image"):
        await serving
