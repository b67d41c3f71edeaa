"""The command `supervit simulate`: a table of how much traffic machines of a profile carry, and at what accuracy.

Parses no arguments and measures nothing; the traffic comes from `arrivals`, the replay from `simulator`.
"""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import Field

from models.latency import LatencyTable
from models.profiles import ProfileTable
from service.scheduling.catalog import VariantCatalog
from service.simulation.arrivals import SlowdownScript, Traffic
from service.simulation.simulator import Figures, Machine, answers_in_time, replay, throughput

SHOWN = 3  # variants listed in a line of the table
TITLES = (
    " rate/s policy              in time accuracy effective rejected dropped overdue  p50 ms  p99 ms  busy  answered by"
)


class Simulate(Traffic):
    """Replay arrivals against a profile in virtual time, to find the machines that they need and the accuracy."""

    policy: str = Field("level", description="policy that chooses sub-network and batch, as for `serve`")
    compare: tuple[str, ...] = Field((), description="other policies to replay the same arrivals with")
    cascades: bool = Field(False, description="look again if a first look was unsure, as for `serve`")
    machines: int = Field(1, ge=1, le=1000, description="number of identical machines, which get requests in turn")
    max_batch_size: int | None = Field(
        None, ge=1, le=64, description="maximum number of requests in a batch; by default as for `serve`"
    )
    overhead_ms: float = Field(0, ge=0, description="time that each batch takes beyond its profile")
    noise: float = Field(
        0, ge=0, le=10, description="each batch takes longer by the absolute value of a normal draw times this"
    )
    checkpoint: str | None = Field(None, description="SuperViT checkpoint; by default the one that `serve` uses")
    json_file: Path | None = Field(None, description="JSON file for all figures")
    plot_file: Path | None = Field(
        None, description="PNG file for a plot over time, of all policies or of several rates"
    )


def simulate(command: Simulate, profiles: ProfileTable, latencies: LatencyTable) -> str:
    """Replay every rate with every policy, write the files that were asked for, and return a table to print.

    Raises:
        InvalidParameterError, BudgetTooSmallError: the options do not fit the profile; too many or no requests.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: matplotlib, which draws the plot, is not installed.
    """
    for path in filter(None, (command.json_file, command.plot_file)):
        path.touch()  # fails now rather than after the simulation
    catalog = VariantCatalog.of(profiles, latencies, cascades=command.cascades)
    largest = command.max_batch_size or catalog.max_batch_size
    capacity, at_lowest = (
        command.machines * throughput(variant, largest) for variant in (catalog.best, catalog.lowest)
    )
    carry = "1 machine sustains" if command.machines == 1 else f"{command.machines} machines sustain"
    best, lowest = catalog.best.profile.subnetwork, catalog.lowest.profile.subnetwork
    most = f"{capacity:.4g} requests/s at {best}, {at_lowest:.4g} at {lowest}"
    text = [f"{carry} at most {most}", TITLES]
    rows, courses = [], {}
    one_rate = len(command.rate or command.load or (1.0,)) == 1
    for rate, arrivals in command.draws(capacity):
        for policy in dict.fromkeys((command.policy, *command.compare)):
            replays = [
                replay(arrivals[index :: command.machines], _machine(command, catalog, index), policy)
                for index in range(command.machines)
            ]
            figures = Figures.of(replays, catalog)
            text.append(_show(rate, policy, figures))
            rows.append({"rate": rate, "policy": policy} | asdict(figures))
            if policy == command.policy or one_rate:
                request_outcomes = [each for one in replays for each in one.request_outcomes]
                courses[f"{policy}, {rate:.4g}/s"] = answers_in_time(request_outcomes)
    if command.json_file:
        options = command.model_dump(mode="json", exclude_none=True)
        command.json_file.write_text(json.dumps({"options": options, "runs": rows}, indent=2) + "\n")
    if command.plot_file:
        from models.evaluation.plots import plot_simulation  # matplotlib comes with an extra only

        plot_simulation(courses, command.plot_file)
    return "\n".join(text)


def _machine(command: Simulate, catalog: VariantCatalog, index: int) -> Machine:
    return Machine(
        catalog,
        command.max_batch_size or catalog.max_batch_size,
        SlowdownScript.parse(command.slowdown),
        command.overhead_ms / 1000,
        command.noise,
        command.seed + index,
    )


def _show(rate: float, policy: str, figures: Figures) -> str:
    share = ["-" if value is None else f"{value:.2%}" for value in (figures.mean_accuracy, figures.effective_accuracy)]
    p50, p99 = (
        "-" if value is None else f"{value:.1f}" for value in (figures.latency_ms["p50"], figures.latency_ms["p99"])
    )
    ends = figures.outcomes
    mix = ", ".join(f"{name} {part:.0%}" for name, part in list(figures.mix.items())[:SHOWN])
    return (
        f"{rate:7.4g} {policy:18} {figures.slo_attainment:8.2%} {share[0]:>8} {share[1]:>9} {ends['rejected']:8}"
        f" {ends['expired'] + ends['shed']:7} {ends['overdue']:7} {p50:>7} {p99:>7} {figures.utilization:5.0%}  {mix}"
    )
