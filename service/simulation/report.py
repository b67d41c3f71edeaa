"""Replays traffic on machines of a profile, and reports how much of it they carry, and at what accuracy.

Parses no arguments, measures nothing, writes no files; the traffic comes from `arrivals`, the replay from `simulator`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from models.latency import LatencyTable
from models.profiles import ProfileTable
from service.scheduling.catalog import VariantCatalog
from service.simulation.arrivals import SlowdownScript
from service.simulation.options import Simulate
from service.simulation.simulator import Figures, Machine, answers_in_time, replay, throughput

SHOWN = 3  # variants listed in a line of the table
TITLES = (
    " rate/s policy              in time accuracy effective rejected dropped overdue  p50 ms  p99 ms  busy  answered by"
)


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the traffic.

    Attributes:
        text: the capacity of the machines, and a table with a line for each run.
        runs: the figures of each rate and policy, for JSON.
        courses: answers over time, by title, of all policies or of several rates.
    """

    text: str
    runs: list[dict[str, Any]]
    courses: dict[str, list[tuple[float, str | None, float | None]]]


def sweep(options: Simulate, profiles: ProfileTable, latencies: LatencyTable) -> Report:
    """Replay every rate with every policy.

    Raises:
        InvalidParameterError, BudgetTooSmallError: the options do not fit the profile; too many or no requests.
        OSError: the trace cannot be read.
    """
    catalog = VariantCatalog.of(profiles, latencies, cascades=options.cascades)
    largest = options.max_batch_size or catalog.max_batch_size
    capacity, at_lowest = (
        options.machines * throughput(variant, largest) for variant in (catalog.best, catalog.lowest)
    )
    carry = "1 machine sustains" if options.machines == 1 else f"{options.machines} machines sustain"
    best, lowest = catalog.best.profile.subnetwork, catalog.lowest.profile.subnetwork
    most = f"{capacity:.4g} requests/s at {best}, {at_lowest:.4g} at {lowest}"
    text = [f"{carry} at most {most}", TITLES]
    runs, courses = [], {}
    one_rate = len(options.rate or options.load or (1.0,)) == 1
    for rate, arrivals in options.draws(capacity):
        for policy in dict.fromkeys((options.policy, *options.compare)):
            replays = [
                replay(arrivals[index :: options.machines], _machine(options, catalog, index), policy)
                for index in range(options.machines)
            ]
            figures = Figures.of(replays, catalog)
            text.append(_show(rate, policy, figures))
            runs.append({"rate": rate, "policy": policy} | asdict(figures))
            if policy == options.policy or one_rate:
                request_outcomes = [each for one in replays for each in one.request_outcomes]
                courses[f"{policy}, {rate:.4g}/s"] = answers_in_time(request_outcomes)
    return Report("\n".join(text), runs, courses)


def _machine(options: Simulate, catalog: VariantCatalog, index: int) -> Machine:
    return Machine(
        catalog,
        options.max_batch_size or catalog.max_batch_size,
        SlowdownScript.parse(options.slowdown),
        options.overhead_ms / 1000,
        options.noise,
        options.seed + index,
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
