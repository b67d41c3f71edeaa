"""Replaces the served model by another one, step by step; whatever goes wrong, the old model continues to serve.

It loads and compiles the new model beside the old one, compares the two, lets the new one rehearse, then answer while
the old one stands by, and finally releases the old one. No request is lost: the model that took a request answers it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from models.checkpoint import Checkpoint
from models.errors import DeviceError
from models.files.checkpoint_errors import CheckpointError
from service.assembly import ServedModel
from service.candidate import CandidateMaker
from service.errors import ModelChangeError, NotReadyError
from service.execution.comparison import Comparer, Comparison, Contender
from service.execution.live_sample import KEPT_IMAGES
from service.model_change import ChangeOutcome, ChangeReport, ChangeStep, ModelChange, Trial
from service.served_models import ServedModels
from service.telemetry.metrics import Metrics

WATCHED_ANSWERS = 32  # answers of the new model after which the old one is released ...
WATCH_S = 10.0  # ... or the time for which the old one stands by if there are fewer
COMPARE_S = 30.0  # time after which no further image is compared, unless a shadow takes longer
POLL_S = 0.05  # between two checks of the new model

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _RolledBackError(Exception):
    """The new model failed while it was serving."""


class ModelChanger:
    """Runs one change at a time; all methods are for the event loop."""

    def __init__(
        self,
        models: ServedModels,
        maker: CandidateMaker,
        metrics: Metrics,
        *,
        refusal: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Create a changer from its collaborators.

        Args:
            models: the served models.
            maker: makes the new model.
            metrics: the metrics of the server.
            refusal: why operators may not request a change; None where they may.
            sleep: waits for the given number of seconds.
            clock: monotonic, in seconds.
            draw: returns a number from 0 to less than 1 for each image that a shadow might see.
        """
        self._models, self._maker, self._metrics, self._refusal = models, maker, metrics, refusal
        self._sleep, self._clock, self._draw = sleep, clock, draw
        self._task: asyncio.Task[None] | None = None
        self._report: ChangeReport | None = None

    @property
    def report(self) -> ChangeReport | None:
        """The report on the current change, or on the last one; None before the first."""
        return self._report

    def ask(self, change: ModelChange) -> ChangeReport:
        """Begin a change that an operator requests, and return its report.

        Raises:
            ModelChangeError: another change is under way, or operators may not request one.
            NotReadyError: no model is served yet.
        """
        if self._refusal is not None:
            raise ModelChangeError(self._refusal)
        return self.begin(change)

    def begin(self, change: ModelChange) -> ChangeReport:
        """Begin a change, also where operators may not request one; other errors as `ask`."""
        if self._task is not None and not self._task.done():
            raise ModelChangeError("another model change is in progress; try again when it has ended")
        if self._models.is_empty:
            raise NotReadyError("the server has no model to change yet; try again in a moment")
        self._report = report = ChangeReport(change.checkpoint, datetime.now(UTC))
        self._task = asyncio.create_task(self._change(change))
        return report

    def close(self) -> None:
        """Cancel the current change, because the server stops."""
        if self._task is not None:
            self._task.cancel()

    async def _change(self, change: ModelChange) -> None:
        began_at, message = self._clock(), None
        outcome: ChangeOutcome = "stopped"
        try:
            outcome, message = await self._outcome_of(change)
        finally:
            seconds = round(self._clock() - began_at, 3)
            self._note(outcome=outcome, message=message, seconds=seconds)
            self._metrics.model.change_ended(outcome)
            logger.info("model change to %s: %s%s", change.checkpoint, outcome, f", {message}" if message else "")

    async def _outcome_of(self, change: ModelChange) -> tuple[ChangeOutcome, str | None]:
        try:
            return await self._take_steps(change)
        except _RolledBackError as error:
            return "went_back", str(error)
        except (ModelChangeError, CheckpointError, DeviceError) as error:
            return "refused", str(error)
        except NotReadyError as error:
            return "stopped", error.message
        except Exception:  # a bug, or a library that cannot run the model: the old one continues
            logger.exception("the model change to %s failed", change.checkpoint)
            return "failed", "the new model could not be prepared; see the server's log"

    async def _take_steps(self, change: ModelChange) -> tuple[ChangeOutcome, str | None]:
        old = self._models.main
        checkpoint = await asyncio.to_thread(self._maker.load, change.checkpoint)
        self._note(name=checkpoint.name, version=checkpoint.version)
        if checkpoint.version == old.checkpoint.version:
            return "unchanged", "this model is already served"
        if not change.force:
            _require_comparable(checkpoint, old.checkpoint, change)
        self._at("prepare")
        new = await asyncio.to_thread(self._maker.prepare, checkpoint, old)
        try:
            if _can_compare(checkpoint, old.checkpoint):
                self._at("compare")
                await self._compare(change, old, new)
            self._at("rehearse")
            await asyncio.to_thread(self._maker.rehearse, new, old)
            await self._put_to_work(change, old, new)
        except BaseException as error:  # cancellation included: whatever ends the change, the new model must close
            new.close()
            if isinstance(error, Exception):  # otherwise the server stops, and the engine may still be running
                await asyncio.to_thread(self._maker.release, new)
            raise
        self._at("retire")
        await self._models.retire(old, self._sleep)
        await asyncio.to_thread(self._maker.release, old)
        return "done", None

    async def _compare(self, change: ModelChange, old: ServedModel, new: ServedModel) -> None:
        """Let both models answer images that the old one answered recently, and those that arrive during a shadow.

        Raises:
            ModelChangeError: they agree on too few images, or the new model is too slow or gives logits that are not
                finite.
        """
        comparer = Comparer(self._contender(old), self._contender(new))
        shadow, began_at = change.shadow, self._clock()
        shadow_ends_at = began_at + (0.0 if shadow is None else shadow.seconds)
        while self._clock() < max(shadow_ends_at, began_at + COMPARE_S):
            is_enough = self._clock() >= shadow_ends_at and comparer.found.num_images >= KEPT_IMAGES
            image = None if is_enough else old.sample.take()
            if image is None:
                if self._clock() >= shadow_ends_at:
                    break
                await self._sleep(POLL_S)
            elif shadow is None or self._draw() < shadow.share:
                await asyncio.to_thread(comparer.compare, image)
                found = comparer.found
                self._note(num_compared=found.num_images, agreement=found.agreement, latency_ratio=found.latency_ratio)
        if not change.force:
            _require_fit(comparer.found, change)

    def _contender(self, model: ServedModel) -> Contender:
        between = self._maker.between_batches(model.engine)
        return Contender(between.run, between.clock, model.checkpoint.class_names)

    async def _put_to_work(self, change: ModelChange, old: ServedModel, new: ServedModel) -> None:
        """Let the new model answer, with a canary only a share of the requests at first; the old one stands by.

        Raises:
            _RolledBackError: the new model failed, and the old one answers again.
        """
        models = self._models
        models.begin(new)
        try:
            if change.canary is not None:
                self._at("canary")
                await self._try_out(old, new, change.canary)
            self._at("watch")
            new.announce()
            await self._try_out(old, new, Trial(1.0, WATCH_S), WATCHED_ANSWERS)
            models.accept(new)
        finally:
            if not models.is_accepted(new):
                models.drop(new)
                old.announce()
                await models.retire(new, self._sleep)

    async def _try_out(
        self, old: ServedModel, new: ServedModel, trial: Trial, num_answers: float = float("inf")
    ) -> None:
        """Let the new model answer a share of the requests, for a time or until it has given `num_answers` answers.

        Return at once if the old model fails meanwhile: there is nothing left to go back to.

        Raises:
            _RolledBackError: the new model failed.
        """
        self._models.try_out(new, trial.share)
        ends_at, until = self._clock() + trial.seconds, new.sample.num_answered + num_answers
        while self._clock() < ends_at and new.sample.num_answered < until:
            await self._sleep(POLL_S)
            if self._models.has_ended(old):
                return
            if new.sample.num_failed or self._models.has_ended(new):
                raise _RolledBackError("the new model failed on a request; the old one serves again")

    def _at(self, step: ChangeStep) -> None:
        self._note(step=step)

    def _note(self, **news: Any) -> None:  # noqa: ANN401 - of a report
        if self._report is not None:
            self._report = replace(self._report, **news)


def _can_compare(new: Checkpoint, old: Checkpoint) -> bool:
    """Return whether the new model takes the old one's images and patch grids."""
    return new.config.image_side == old.config.image_side and set(old.config.patch_grids) <= set(new.config.patch_grids)


def _require_comparable(new: Checkpoint, old: Checkpoint, change: ModelChange) -> None:
    """Check that the new model is comparable to the old one, before any of it runs.

    Raises:
        ModelChangeError: the new model is not comparable, or is known to cost too much.
    """
    if not _can_compare(new, old):
        raise ModelChangeError('its image size or patch grids do not fit the served model; use "force" to serve it')
    costlier = _cheapest_macs(new) / _cheapest_macs(old)
    if costlier > change.most_slowdown:
        message = f"its cheapest sub-network costs {costlier:.3g} times as much as that of the served model"
        raise ModelChangeError(f"{message}, more than most_slowdown ({change.most_slowdown:g})")


def _cheapest_macs(checkpoint: Checkpoint) -> int:
    return min(row.macs for row in checkpoint.profile.rows)


def _require_fit(found: Comparison, change: ModelChange) -> None:
    if found.agreement is not None and found.agreement < change.least_agreement:
        message = f"the new model agrees with the served one on {found.agreement:.1%} of {found.num_images} images"
        raise ModelChangeError(f"{message}, less than least_agreement ({change.least_agreement:.1%})")
    if found.latency_ratio is not None and found.latency_ratio > change.most_slowdown:
        message = f"the new model takes {found.latency_ratio:.3g} times as long as the served one"
        raise ModelChangeError(f"{message}, more than most_slowdown ({change.most_slowdown:g})")
