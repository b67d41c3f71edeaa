"""Plots of profiles, training runs, simulations, benchmarks and latencies.

Outside of tests/, only this module imports matplotlib.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from models.latency import LatencyTable
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
    if profile.cascades:
        axes.plot(
            [profile.expected_gflops(cascade) for cascade in profile.cascades],
            [100 * cascade.top1 for cascade in profile.cascades],
            "k.--",
            linewidth=1,
            label="cascades",
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
    for name in dict.fromkeys(name for record in records for name in record["loss"]):  # cheap epochs have other losses
        loss_axes.plot(epochs, [record["loss"].get(name, math.nan) for record in records], label=name)
    for name in dict.fromkeys(name for record in records for name in record["top1"]):  # runs strung together may differ
        accuracy_axes.plot(epochs, [100 * record["top1"].get(name, math.nan) for record in records], label=name)
    loss_axes.set(xlabel="epoch", ylabel="training loss")
    accuracy_axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_simulation(runs: Mapping[str, Sequence[tuple[float, str | None, float | None]]], path: Path) -> None:
    """Draw the outcome of requests over their arrival: by sub-network for the first run, as shares for every run.

    Args:
        runs: by title, for each request its arrival in seconds, the sub-network that answered in time or None, and
            its top-1.
        path: the PNG file.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    mix_axes, attainment_axes, accuracy_axes = figure.subplots(3, 1, sharex=True)
    title, first = next(iter(runs.items()))
    width_s = max(at for run in runs.values() for at, _, _ in run) / 60 or 1.0
    top1 = {name: accuracy or 0.0 for _, name, accuracy in first if name is not None}
    ladder = [*sorted(top1, key=lambda name: (top1[name], name)), None]
    mix_axes.hist(
        [[at for at, name, _ in first if name == rung] for rung in ladder],
        bins=[width_s * index for index in range(62)],
        weights=[[1 / width_s for _, name, _ in first if name == rung] for rung in ladder],
        stacked=True,
        label=[name or "not in time" for name in ladder],
        color=[*(colormaps["viridis"](index / len(ladder)) for index in range(len(ladder) - 1)), "crimson"],
    )
    for name, run in runs.items():
        bins: dict[int, list[float | None]] = {}
        for at, answered_by, accuracy in run:
            bins.setdefault(int(at / width_s), []).append(None if answered_by is None else accuracy or math.nan)
        times = [(index + 0.5) * width_s for index in sorted(bins)]
        in_time = [[accuracy for accuracy in bins[index] if accuracy is not None] for index in sorted(bins)]
        shares = [100 * len(kept) / len(bins[index]) for kept, index in zip(in_time, sorted(bins), strict=True)]
        attainment_axes.plot(times, shares, label=name)
        accuracy_axes.plot(times, [100 * sum(kept) / len(kept) if kept else math.nan for kept in in_time], label=name)
    mix_axes.set(ylabel="requests per second", title=f"{title}: answers in time by sub-network (grid-keep rate)")
    attainment_axes.set(ylabel="answered in time (%)")
    accuracy_axes.set(xlabel="arrival (s)", ylabel="top-1 of answers in time (%)")
    for axes in (mix_axes, attainment_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    mix_axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    attainment_axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def plot_bench(runs: Mapping[str, Sequence[tuple[float, float | None, bool]]], path: Path) -> None:
    """Draw the latency of answers and the share in time, over the instants at which requests were due.

    Args:
        runs: by title, for each request its due instant in seconds, the seconds until its answer, None if none came,
            and whether the answer was in time.
        path: the PNG file.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    latency_axes, attainment_axes = figure.subplots(2, 1, sharex=True)
    width_s = max(at for run in runs.values() for at, _, _ in run) / 60 or 1.0
    for name, run in runs.items():
        answers = [(at, 1000 * took_s) for at, took_s, _ in run if took_s is not None]
        latency_axes.plot([at for at, _ in answers], [took_ms for _, took_ms in answers], ".", markersize=3)
        bins: dict[int, list[bool]] = {}
        for at, _, in_time in run:
            bins.setdefault(int(at / width_s), []).append(in_time)
        shares = [100 * sum(bins[index]) / len(bins[index]) for index in sorted(bins)]
        attainment_axes.plot([(index + 0.5) * width_s for index in sorted(bins)], shares, label=name)
    latency_axes.set(ylabel="latency of answers (ms)", yscale="log")
    attainment_axes.set(xlabel="due (s)", ylabel="answered in time (%)", ylim=(0, 101))
    for axes in (latency_axes, attainment_axes):
        axes.grid(alpha=0.3)
    attainment_axes.legend()
    figure.savefig(path, dpi=120)


def plot_latency(table: LatencyTable, path: Path) -> None:
    """Draw the measured time per image over the batch size: a panel per patch grid, a line per keep rate."""
    grids = sorted({subnetwork.patch_grid for subnetwork in table.seconds})
    rates = sorted({subnetwork.keep_rate for subnetwork in table.seconds})
    figure = Figure(figsize=(1.5 + 2.4 * len(grids), 4), layout="constrained")
    panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    scale = Normalize(rates[0], max(rates[-1], rates[0] + 0.01))
    colours = ScalarMappable(scale, "viridis_r")
    for grid, axes in zip(grids, panels, strict=True):
        for subnetwork, figures in sorted(table.seconds.items()):
            if subnetwork.patch_grid == grid:
                per_image_ms = [1e3 * seconds / size for size, seconds in zip(table.batch_sizes, figures, strict=True)]
                axes.plot(table.batch_sizes, per_image_ms, ".-", color=colours.cmap(scale(subnetwork.keep_rate)))
        axes.set(title=f"grid {grid}", xlabel="batch size", xscale="log")
        axes.set_xticks(table.batch_sizes, [str(size) for size in table.batch_sizes], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="ms per image", ylim=(0, None))
    figure.colorbar(colours, ax=panels[-1], label="keep rate")
    figure.savefig(path, dpi=120)
