"""The pictures: accuracy over cost, and the course of a training run. matplotlib enters here alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from models.profiles import ProfileTable


def plot_frontier(profile: ProfileTable, title: str, path: Path) -> None:
    """Draw top-1 over GFLOPs, a line per patch grid, the frontier marked; the profile must be measured."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for grid in sorted({row.subnetwork.patch_grid for row in profile.rows}):
        rows = [row for row in profile.rows if row.subnetwork.patch_grid == grid]
        axes.plot([row.gflops for row in rows], [100 * (row.top1 or 0) for row in rows], "o-", label=f"grid {grid}")
    axes.plot(
        [row.gflops for row in profile.frontier],
        [100 * (row.top1 or 0) for row in profile.frontier],
        color="black",
        linewidth=6,
        alpha=0.15,
        label="frontier",
    )
    axes.set(xlabel="GFLOPs (1e9 multiply-accumulates) per image", ylabel="top-1 accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def plot_training(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw losses and validation accuracy over the epochs of a training log."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in records]
    for name in records[0]["loss"]:
        loss_axes.plot(epochs, [record["loss"][name] for record in records], label=name)
    for name in records[0]["top1"]:
        accuracy_axes.plot(epochs, [100 * record["top1"][name] for record in records], label=name)
    loss_axes.set(xlabel="epoch", ylabel="training loss")
    accuracy_axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
