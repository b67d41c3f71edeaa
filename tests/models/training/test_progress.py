import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.training.progress import Progress
from models.training.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def curves(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what TensorBoard would draw: by name, (step, value)."""
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_remaining_time_of_the_run_is_estimated_from_the_pace_so_far(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    clock = Clock()
    recipe = tiny_recipe(tmp_path, epochs=10)
    with Progress(recipe, 5, 100, epochs_done=8, is_shown=False, clock=clock) as progress:
        progress.start_epoch(9)
        clock.now_s += 4
        progress.add_batch(20, {"single grid": 1.0})
        assert progress.run_left_s == pytest.approx(4 / 20 * 180)
        clock.now_s += 3  # a slower batch
        progress.add_batch(20, {"single grid": 1.0})
        assert progress.run_left_s == pytest.approx(7 / 40 * 160)


def test_the_bar_shows_images_per_second_the_loss_and_both_remaining_times(
    tmp_path: Path, tiny_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with Progress(tiny_recipe(tmp_path, epochs=2), 2, 40, epochs_done=0, is_shown=True, clock=clock) as progress:
        progress.start_epoch(1)
        clock.now_s += 60
        progress.add_batch(20, {"largest grid": 1.0, "smaller grid": 0.25})
        progress.end_epoch()
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].split("\r")[-1].startswith("epoch 1/2:  50%")
    assert " images/s, loss 1.250, whole run 03:00 left]" in shown
    assert "20.0/40.0" in shown


def test_progress_that_is_not_shown_prints_and_writes_nothing(
    tmp_path: Path, tiny_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(tiny_recipe(tmp_path), 2, 40, epochs_done=0, is_shown=False) as progress:
        progress.start_epoch(1)
        progress.add_batch(20, {"single grid": 1.0})
        progress.add_step(0, {"single grid": 1.0}, 0.1)
        progress.end_epoch()
        progress.add_accuracies(1, {"grid 4 at keep rate 1": 0.5})
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_the_curves_of_a_resumed_run_continue_where_the_saved_epochs_end(
    tmp_path: Path, tiny_recipe: MakeRecipe
) -> None:
    recipe = tiny_recipe(tmp_path, epochs=2)
    with Progress(recipe, 2, 40, epochs_done=0, is_shown=True) as progress:
        for step in range(3):  # cut short in the second epoch
            progress.add_step(step, {"single grid": 1.0 - step / 4}, 0.5)
            if step == 1:
                progress.add_accuracies(1, {"grid 4 at keep rate 1": 0.25})
    with Progress(recipe, 2, 40, epochs_done=1, is_shown=True) as progress:
        for step in (2, 3):
            progress.add_step(step, {"single grid": 0.125}, 0.25)
        progress.add_accuracies(2, {"grid 4 at keep rate 1": 0.75})
    with Progress(recipe, 2, 40, epochs_done=2, is_shown=True):
        pass  # a run that is resumed at its end draws nothing
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert curves(tmp_path) == {
        "loss/single grid": [(0, 1.0), (1, 0.75), (2, 0.125), (3, 0.125)],
        "learning rate": [(0, 0.5), (1, 0.5), (2, 0.25), (3, 0.25)],
        "top-1/grid 4 at keep rate 1": [(1, 0.25), (3, 0.75)],
    }


def test_without_tensorboard_there_are_no_curves_and_no_error(
    tmp_path: Path, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with Progress(tiny_recipe(tmp_path), 2, 40, epochs_done=0, is_shown=True) as progress:
        progress.start_epoch(1)
        progress.add_batch(40, {"single grid": 1.0})
        progress.add_step(0, {"single grid": 1.0}, 0.5)
        progress.add_accuracies(1, {"grid 4 at keep rate 1": 0.25})
    assert not list(tmp_path.iterdir())
