import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from models.checkpoint import Checkpoint
from models.files.checkpoint_errors import UnreadableCheckpointError
from models.subnetwork import SubNetwork, SuperViTConfig
from service.assembly import ServedModel
from service.candidate import BetweenBatches, CandidateMaker
from service.errors import ModelChangeError, NotReadyError
from service.execution.comparison import TIMED_IMAGES
from service.execution.live_sample import KEPT_IMAGES, LiveSample
from service.execution.results import rank
from service.model_change import ChangeReport, ModelChange, Trial
from service.model_changer import COMPARE_S, WATCH_S, WATCHED_ANSWERS, ModelChanger
from service.served_models import ServedModels
from service.telemetry.metrics import Metrics
from tests.service.conftest import stand_in

pytestmark = pytest.mark.anyio

SMALL = SubNetwork(2, 0.5)
OLD = replace(stand_in("a", "b"), name="old", version="000")
NEW = replace(stand_in("a", "b"), name="new", version="111")


class Model:
    """A model that answers with the first class, unless a test sets other logits."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.seconds = 0.001
        self.then: Callable[[], None] = lambda: None
        self.announce: Callable[[], None] = lambda: None
        self.checkpoint, self.sample, self.engine = checkpoint, LiveSample(), self
        self.is_unused, self.is_closed, self.is_released = True, False, False
        self.logits = torch.tensor([[1.0, 0.0]])
        self.error: Exception | None = None
        self.ended = asyncio.Event()
        self.batcher = SimpleNamespace(stop=self.ended.set, abandon=self.ended.set)

    def run(self, images: Tensor, _: SubNetwork) -> Tensor:
        return self.logits.expand(len(images), 2)

    def answer(self, count: int = 1) -> None:
        images, logits = torch.zeros(count, 3, 2, 2, dtype=torch.uint8), self.logits.expand(count, 2)
        self.sample.answered(list(images), SMALL, rank(logits.numpy(), 1.0, 0.0))

    async def serve(self) -> None:
        await self.ended.wait()
        self.is_closed = True
        if self.error:
            raise self.error

    def take_over(self, other: "Model") -> None:
        self.learned_of = other

    def close(self) -> None:
        self.is_closed = True


class Stage:
    """A server that changes from OLD to NEW in virtual time; a test sets what happens at each check of NEW."""

    def __init__(self, refusal: str | None = None) -> None:
        self.now = 1000.0
        self.old, self.new = Model(OLD), Model(NEW)
        self.load_error: Exception | None = None
        self.prepare_error: Exception | None = None
        self.registry, self.models = CollectorRegistry(), ServedModels(lambda: 0.5)
        self.metrics = Metrics(self.registry)
        self.metrics.describe([], OLD.name, OLD.version)
        for model in (self.old, self.new):
            model.announce = partial(self.metrics.model.serves, model.checkpoint.name, model.checkpoint.version)
        self.at_look: Callable[[str], None] = self.answer
        self.drawn: list[float] = []
        self.is_rehearsed = False
        self.steps: list[str] = []
        self.changer = ModelChanger(
            self.models,
            cast(CandidateMaker, self),
            self.metrics,
            refusal=refusal,
            sleep=self.sleep,
            clock=lambda: self.now,
            draw=lambda: self.drawn.pop(0),
        )

    def load(self, _: str) -> Checkpoint:
        if self.load_error:
            raise self.load_error
        return self.new.checkpoint

    def prepare(self, checkpoint: Checkpoint, beside: ServedModel) -> ServedModel:
        assert checkpoint is self.new.checkpoint
        assert beside is cast(ServedModel, self.old)
        if self.prepare_error:
            raise self.prepare_error
        return cast(ServedModel, self.new)

    def rehearse(self, model: ServedModel, beside: ServedModel) -> None:
        assert (model, beside) == (cast(ServedModel, self.new), cast(ServedModel, self.old))
        assert self.models.all == (beside,)
        assert self.changer.report is not None
        assert self.changer.report.step == "rehearse"
        self.is_rehearsed = True

    def release(self, model: Model) -> None:
        assert model.is_closed
        model.is_released = True

    def between_batches(self, engine: Model) -> BetweenBatches:
        def run(images: Tensor, subnetwork: SubNetwork) -> Tensor:
            self.now += engine.seconds
            engine.then()
            return engine.run(images, subnetwork)

        return cast(BetweenBatches, SimpleNamespace(run=run, clock=lambda: self.now))

    def answer(self, _: str) -> None:
        cast(Model, self.models.main).answer()

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)
        report = self.changer.report
        assert report is not None
        self.steps.append(report.step)
        self.at_look(report.step)

    async def change(self, **wanted: object) -> ChangeReport:
        self.models.start(cast(ServedModel, self.old))
        serving = asyncio.create_task(self.models.run())
        await asyncio.sleep(0)
        self.changer.ask(ModelChange("new.safetensors", **wanted))  # type: ignore[arg-type] # fields of the change
        report = await self.outcome()
        self.is_serving, self.is_old_closed = not serving.done(), self.old.is_closed
        self.served = cast(Model, self.models.main).checkpoint.name
        self.models.stop()
        await serving
        return report

    async def outcome(self) -> ChangeReport:
        for _ in range(10_000):
            await asyncio.sleep(0.0001)
            report = self.changer.report
            if report is not None and report.outcome is not None:
                return report
        raise AssertionError("the change does not end")

    def read(self, metric: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"supervit_{metric}", labels)


@pytest.fixture
async def stage() -> Stage:
    return Stage()


async def test_a_model_that_agrees_with_the_served_one_replaces_it(stage: Stage) -> None:
    for _ in range(TIMED_IMAGES):
        stage.old.answer(3)
    report = await stage.change()
    assert (report.outcome, report.message, report.step) == ("done", None, "retire")
    assert (report.name, report.version, report.num_compared, report.agreement) == ("new", "111", TIMED_IMAGES, 1.0)
    assert report.latency_ratio == pytest.approx(1.0)
    assert stage.served == "new"
    assert stage.is_serving
    assert stage.is_rehearsed
    assert (stage.old.is_released, stage.new.is_released) == (True, False)
    assert stage.read("model_changes_total", outcome="done") == 1
    assert stage.read("model_info", name="old", version="000") == 0
    assert stage.read("model_info", name="new", version="111") == 1


async def test_the_old_model_stands_by_until_the_new_one_has_given_enough_answers(stage: Stage) -> None:
    def look(step: str) -> None:
        if step == "watch":
            assert not stage.old.is_closed
            assert len(stage.models.all) == 2
        stage.new.answer()

    stage.at_look = look
    await stage.change()
    assert stage.steps.count("watch") == WATCHED_ANSWERS


async def test_the_old_model_stands_by_for_a_fixed_time_if_no_requests_arrive(stage: Stage) -> None:
    stage.at_look = lambda _: None
    before = stage.now
    report = await stage.change()
    assert report.outcome == "done"
    assert stage.now - before == pytest.approx(WATCH_S, abs=0.2)
    assert (report.num_compared, report.agreement, report.latency_ratio) == (0, None, None)


async def test_a_checkpoint_that_is_already_served_changes_nothing(stage: Stage) -> None:
    stage.new = Model(replace(NEW, version="000"))
    report = await stage.change()
    assert (report.outcome, report.message) == ("unchanged", "this model is already served")
    assert stage.served == "old"


@pytest.mark.parametrize(
    "error", [UnreadableCheckpointError("is cut short"), ModelChangeError("a second model may take 3000 MB")]
)
async def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(stage: Stage, error: Exception) -> None:
    stage.load_error = error
    report = await stage.change()
    assert (report.outcome, report.message, report.step) == ("refused", str(error), "load")
    assert stage.served == "old"
    assert stage.is_serving
    assert not stage.is_old_closed
    assert stage.read("model_changes_total", outcome="refused") == 1


async def test_a_model_that_cannot_be_compiled_changes_nothing_and_the_log_says_why(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.prepare_error = RuntimeError("secret of a library")
    report = await stage.change()
    assert (report.outcome, report.step) == ("failed", "prepare")
    assert "secret" not in str(report.message)
    assert "secret" in caplog.text
    assert stage.served == "old"


async def test_a_model_that_disagrees_with_the_served_one_is_refused_unless_forced(stage: Stage) -> None:
    stage.new.logits = torch.tensor([[0.0, 1.0]])
    stage.old.answer()
    report = await stage.change()
    assert (report.outcome, report.step, report.agreement) == ("refused", "compare", 0.0)
    assert "agrees with the served one on 0.0% of 1 images" in str(report.message)
    assert stage.served == "old"
    assert (stage.old.is_released, stage.new.is_released) == (False, True)

    forced = Stage()
    forced.new.logits = torch.tensor([[0.0, 1.0]])
    forced.old.answer()
    report = await forced.change(force=True)
    assert (report.outcome, report.agreement, forced.served) == ("done", 0.0, "new")


async def test_a_model_that_is_too_slow_is_refused(stage: Stage) -> None:
    stage.new.seconds = 0.0021
    for _ in range(TIMED_IMAGES):
        stage.old.answer()
    report = await stage.change()
    assert report.outcome == "refused"
    assert report.latency_ratio == pytest.approx(2.1)
    assert "takes 2.1 times as long as the served one, more than most_slowdown (2)" in str(report.message)


async def test_a_model_whose_cheapest_sub_network_costs_too_much_is_refused_before_it_runs(stage: Stage) -> None:
    profile = NEW.profile
    expensive = replace(profile, rows=tuple(replace(row, macs=3 * row.macs) for row in profile.rows))
    stage.new = Model(replace(NEW, profile=expensive))
    report = await stage.change()
    assert (report.outcome, report.step) == ("refused", "load")
    assert "costs 3 times as much" in str(report.message)


@pytest.mark.parametrize("different", [{"image_side": 32}, {"patch_grids": (4,)}])
async def test_a_model_with_another_image_size_or_patch_grids_needs_force_and_is_not_compared(
    different: dict[str, object],
) -> None:
    stage = Stage()
    stage.new = Model(replace(NEW, config=replace_config(different)))
    stage.old.answer()
    report = await stage.change()
    assert (report.outcome, report.step) == ("refused", "load")
    assert 'use "force" to serve it' in str(report.message)

    forced = Stage()
    forced.new = Model(stage.new.checkpoint)
    forced.old.answer()
    report = await forced.change(force=True)
    assert (report.outcome, report.num_compared) == ("done", 0)


def replace_config(different: dict[str, object]) -> SuperViTConfig:
    """Return a configuration that differs; a model need not be buildable from it."""
    fields = {"image_side": NEW.config.image_side, "patch_grids": NEW.config.patch_grids}
    return cast(SuperViTConfig, SimpleNamespace(**(fields | different)))


async def test_a_model_with_logits_that_are_not_finite_is_refused_even_if_forced(stage: Stage) -> None:
    stage.new.logits = torch.full((1, 2), float("nan"))
    stage.old.answer()
    report = await stage.change(force=True)
    assert (report.outcome, report.step) == ("refused", "compare")
    assert "not finite" in str(report.message)


@pytest.mark.parametrize("how", ["failed", "nan", "ended"])
async def test_the_old_model_returns_if_the_new_one_fails_while_serving(stage: Stage, how: str) -> None:
    def look(step: str) -> None:
        if step != "watch" or stage.models.main is not cast(ServedModel, stage.new):
            return
        if how == "failed":
            stage.new.sample.failed()
        elif how == "nan":
            stage.new.logits = torch.full((1, 2), float("nan"))
            stage.new.answer()
        else:
            stage.new.error = RuntimeError("the model fails on every image")
            stage.new.ended.set()

    stage.at_look = look
    report = await stage.change()
    assert (report.outcome, report.step) == ("went_back", "watch")
    assert stage.served == "old"
    assert stage.is_serving
    assert stage.new.is_released
    assert stage.read("model_info", name="old", version="000") == 1
    assert stage.read("model_info", name="new", version="111") == 0
    assert stage.read("model_changes_total", outcome="went_back") == 1


@pytest.mark.parametrize("how", ["well", "badly"])
async def test_the_new_model_stays_if_the_old_one_fails_while_standing_by(stage: Stage, how: str) -> None:
    def look(step: str) -> None:
        if step != "watch":
            return
        stage.old.error = RuntimeError("the model fails on every image")
        stage.old.ended.set()
        # There is nothing left to go back to.
        if how == "badly" and stage.models.has_ended(cast(ServedModel, stage.old)):
            stage.new.sample.failed()

    stage.at_look = look
    report = await stage.change()
    assert (report.outcome, report.step) == ("done", "retire")
    assert stage.served == "new"
    assert stage.is_serving
    assert stage.read("model_info", name="new", version="111") == 1


async def test_the_number_of_compared_images_is_bounded_while_more_arrive(stage: Stage) -> None:
    stage.old.then = stage.old.answer  # the next image arrives before the last one is compared
    stage.old.answer()
    report = await stage.change()
    assert report.num_compared == KEPT_IMAGES


async def test_a_slow_comparison_ends_with_the_images_compared_so_far(stage: Stage) -> None:
    stage.old.seconds = stage.new.seconds = 1.0
    stage.old.then = stage.old.answer
    stage.old.answer()
    report = await stage.change()
    assert report.outcome == "done"
    assert 0 < report.num_compared <= COMPARE_S


async def test_a_shadow_is_compared_on_a_share_of_the_arriving_images_and_answers_no_request(stage: Stage) -> None:
    def look(step: str) -> None:
        assert step != "compare" or len(stage.models.all) == 1
        cast(Model, stage.models.main).answer()

    stage.at_look, stage.drawn = look, [0.1, 0.9] * 1000
    before = stage.now
    report = await stage.change(shadow=Trial(0.5, 20.0))
    assert report.outcome == "done"
    looks = stage.steps.count("compare")
    assert stage.now - before >= 20.0
    assert report.num_compared == pytest.approx(looks / 2, rel=0.1)


async def test_a_canary_answers_its_share_for_its_time_before_it_gets_all_requests(stage: Stage) -> None:
    mains: list[str] = []

    def look(step: str) -> None:
        if step == "canary":
            mains.append(cast(Model, stage.models.main).checkpoint.name)
            assert len(stage.models.drawn()) == 2
        stage.answer(step)

    stage.at_look = look
    report = await stage.change(canary=Trial(0.2, 5.0))
    assert report.outcome == "done"
    assert set(mains) == {"old"}
    assert len(mains) == pytest.approx(100, abs=2)


async def test_a_canary_that_fails_never_gets_all_requests(stage: Stage) -> None:
    stage.at_look = lambda step: stage.new.sample.failed() if step == "canary" else None
    report = await stage.change(canary=Trial(0.2, 5.0))
    assert (report.outcome, report.step, stage.served) == ("went_back", "canary", "old")


async def test_only_one_model_change_runs_at_a_time(stage: Stage) -> None:
    def look(_: str) -> None:
        with pytest.raises(ModelChangeError, match="another model change"):
            stage.changer.ask(ModelChange("third"))
        stage.new.answer()

    stage.at_look = look
    assert (await stage.change()).outcome == "done"


async def test_a_refusal_stops_changes_of_operators_but_not_those_of_the_server_itself() -> None:
    stage = Stage(refusal="one of several workers")
    with pytest.raises(ModelChangeError, match="one of several workers"):
        stage.changer.ask(ModelChange("new"))
    with pytest.raises(NotReadyError):
        stage.changer.begin(ModelChange("new"))


async def test_a_stopping_server_cancels_the_model_change(stage: Stage) -> None:
    def look(step: str) -> None:
        if step == "watch":
            stage.changer.close()

    stage.at_look = look
    report = await stage.change()
    assert report.outcome == "stopped"
    assert stage.new.is_closed
    assert stage.served == "old"


async def test_a_change_is_reported_as_stopped_if_the_server_stops_during_the_preparation(stage: Stage) -> None:
    stage.prepare_error = NotReadyError("the server is stopping")
    assert (await stage.change()).outcome == "stopped"
