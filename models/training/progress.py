"""What a run shows while it trains: a progress bar per epoch and, if TensorBoard is installed, its curves.

It measures nothing but time. The log and its plot, which are kept, are written by models.training.state.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from models.training.recipe import Recipe

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BOARD_NAME = "tensorboard"


class Progress:
    """The progress bar and the curves of a run; inactive in processes that show nothing."""

    def __init__(
        self,
        recipe: Recipe,
        steps_per_epoch: int,
        images_per_epoch: int,
        epochs_done: int,
        *,
        is_shown: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start to show a new or a resumed run.

        Args:
            recipe: the recipe of the run.
            steps_per_epoch: optimiser steps per epoch.
            images_per_epoch: images per epoch, of all processes together.
            epochs_done: epochs that the resumed run has finished; the curves continue after them.
            is_shown: whether this process shows anything.
            clock: the current time in seconds.
        """
        self.epochs, self.steps_per_epoch, self.images_per_epoch = recipe.epochs, steps_per_epoch, images_per_epoch
        self.is_shown, self.clock, self.output = is_shown, clock, recipe.output
        self.next_step = epochs_done * steps_per_epoch
        self.images_left = (recipe.epochs - epochs_done) * images_per_epoch
        self.images_seen, self.started_at = 0, clock()
        self.bar: tqdm[Any] = tqdm(disable=True)
        self.opened = ExitStack()

    def __enter__(self) -> Self:
        """Return the progress, which shows nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the bar and the curves, however the run ended."""
        self.bar.close()
        self.opened.close()

    def start_epoch(self, epoch: int) -> None:
        """Start a bar, which shows images per second and the time left in the epoch by itself."""
        self.bar = tqdm(
            total=self.images_per_epoch,
            desc=f"epoch {epoch}/{self.epochs}",
            disable=not self.is_shown,
            mininterval=1,
            unit=" images",
            unit_scale=True,
        )

    def add_batch(self, images: int, losses: Mapping[str, float]) -> None:
        """Advance the bar by the images of one batch in all processes."""
        self.images_seen += images
        self.images_left -= images
        left = tqdm.format_interval(self.run_left_s)
        self.bar.set_postfix_str(f"loss {sum(losses.values()):.3f}, whole run {left} left", refresh=False)
        self.bar.update(images)

    def add_step(self, step: int, losses: Mapping[str, float], learning_rate: float) -> None:
        """Draw the losses and the learning rate of a step, counted from 0 over all epochs."""
        if self.board is not None:
            for name, loss in losses.items():
                self.board.add_scalar(f"loss/{name}", loss, step)
            self.board.add_scalar("learning rate", learning_rate, step)

    def end_epoch(self) -> None:
        """Close the bar, so that the next output starts on a line of its own."""
        self.bar.close()

    def add_accuracies(self, epoch: int, top1: Mapping[str, float]) -> None:
        """Draw the accuracies measured after an epoch at its last step: a later step belongs to the next epoch."""
        if self.board is not None:
            for name, accuracy in top1.items():
                self.board.add_scalar(f"top-1/{name}", accuracy, epoch * self.steps_per_epoch - 1)

    @property
    def run_left_s(self) -> float:
        """Seconds to the end of the run at the pace so far, including the measurements between epochs."""
        return (self.clock() - self.started_at) / self.images_seen * self.images_left

    @cached_property
    def board(self) -> "SummaryWriter | None":
        """TensorBoard's writer, opened when there is something to draw; points of repeated steps are dropped."""
        if not self.is_shown:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter  # imported here, because it is optional
        except ImportError:
            return None
        board = SummaryWriter(str(self.output / BOARD_NAME), purge_step=self.next_step)
        self.opened.callback(board.close)
        return board
