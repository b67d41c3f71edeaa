"""Every policy over families of arrivals, in virtual time: accuracy, whether ours passes its bars, decision times.

python -m tests.benchmarks.bench_policies [--seeds 3] [--seconds 20] [--policies slackfit,step-down]
python -m tests.benchmarks.bench_policies --latencies FILE.json [--checkpoint PATH]
"""

import argparse
import json
import timeit
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from models.checkpoint import load_checkpoint
from models.flops import count_macs
from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.published import PUBLISHED
from models.subnetwork import SubNetwork
from service.scheduling.catalog import VariantCatalog
from service.scheduling.policies import find_policy, policy_names
from service.scheduling.state import BatchDecision, Decide, SchedulerState
from service.simulation.arrivals import Arrival, SlowdownScript, gamma, varying
from service.simulation.simulator import Figures, Machine, Replay, throughput

# DeiT-S on two cores with AMX, bfloat16 (milliseconds at batch 1 and 8); the others are interpolated by MACs.
ANCHORS_MS = {SubNetwork(8, 0.5): (5.2, 18.1), SubNetwork(14, 0.5): (9.4, 43.0), SubNetwork(14, 1.0): (14.7, 73.5)}
BATCH_SIZES = (1, 8, 16)
NEIGHBOUR = (1.0, 1.5, 1.0, 3.0, 1.0, 2.0)  # slowdown factors, each for a tenth of the time
TIMED_EVERY, REPEATS = 7, 5
SHARE_BAR = 0.99
# Points above SlackFit that `level` must reach on average, by group of families; "" is all of them.
BARS = {"": 2, "overload": 10, "everything at once": 5, "noisy neighbour": 3}


@dataclass(frozen=True, slots=True)
class Family:
    """Arrivals, the slowdown of the machine during them, and the bar that they belong to."""

    arrivals: list[Arrival]
    slowdown: SlowdownScript
    bar: str = ""


class Timed:
    """A policy that times every seventh decision, as the fastest of some repeats because the machine is noisy."""

    def __init__(self, decide: Decide) -> None:
        self.decisions: list[tuple[float, int]] = []  # microseconds, and the length of the queue
        self._decide, self._calls = decide, 0

    def __call__(self, state: SchedulerState) -> BatchDecision:
        self._calls += 1
        if self._calls % TIMED_EVERY == 0:
            fastest_s = min(timeit.repeat(lambda: self._decide(state), repeat=REPEATS, number=1))
            self.decisions.append((1e6 * fastest_s, len(state.queue)))
        return self._decide(state)


def _always(decide: Decide, _catalog: VariantCatalog, _max_batch_size: int) -> Decide:
    return decide


class Draw:
    """Draws families of arrivals for a catalog, the same for the same seed."""

    def __init__(self, catalog: VariantCatalog, seed: int, seconds: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.seconds = seconds
        self.capacity = throughput(catalog.best, 16)
        best = catalog.num_levels - 1
        self.caps = [None, *(catalog.variants[max(0, level)].profile.gflops for level in (1, best // 2, best - 2))]

    def family(
        self,
        times: Sequence[float],
        *,
        budgets_ms: Sequence[float] = (100,),
        capped: bool = False,
        neighbour: bool = False,
        bar: str = "",
    ) -> Family:
        """Give each arrival a latency budget and, if `capped`, a GFLOPs cap; if `neighbour`, add slowdowns."""
        budgets = self.rng.choice(budgets_ms, len(times)) / 1000
        caps = self.rng.integers(len(self.caps), size=len(times))
        arrivals = [
            Arrival(at, float(budget), self.caps[cap] if capped else None)
            for at, budget, cap in zip(times, budgets, caps, strict=True)
        ]
        steps = [(index * self.seconds / 10, NEIGHBOUR[index % len(NEIGHBOUR)]) for index in range(10)]
        return Family(arrivals, SlowdownScript(tuple(steps) if neighbour else ()), bar)

    def gamma(self, load: float, cv2: float = 1.0) -> list[float]:
        return gamma(load * self.capacity, cv2, self.seconds, self.rng)

    def varying(self, load_at: Callable[[float], float], highest: float) -> list[float]:
        return varying(lambda at: load_at(at) * self.capacity, highest * self.capacity, self.seconds, self.rng)

    def spikes(self, size: int, load: float) -> list[float]:
        """Add `size` requests at the same instant to a load, every second."""
        return sorted([*self.gamma(load), *(float(at) for at in range(1, int(self.seconds)) for _ in range(size))])

    def families(self) -> dict[str, Family]:
        mixed = (50, 100, 200, 500)
        return {
            "poisson 0.05": self.family(self.gamma(0.05)),
            "poisson 0.5": self.family(self.gamma(0.5)),
            "poisson 1.0": self.family(self.gamma(1.0)),
            "poisson 1.5": self.family(self.gamma(1.5)),
            "poisson 2.5": self.family(self.gamma(2.5)),
            "gamma CV2=2 1.5": self.family(self.gamma(1.5, 2)),
            "gamma CV2=4 1.0": self.family(self.gamma(1.0, 4)),
            "gamma CV2=8 1.0": self.family(self.gamma(1.0, 8)),
            "gamma CV2=8 1.5": self.family(self.gamma(1.5, 8)),
            "on/off 0-2.2": self.family(self.varying(lambda at: 2.2 if int(at) % 2 else 0.0, 2.2)),
            "ramp 0-3": self.family(self.varying(lambda at: 3 * at / self.seconds, 3.0)),
            "step 0.5-2.5": self.family(self.varying(lambda at: 2.5 if at > self.seconds / 2 else 0.5, 2.5)),
            "60 at once 0.3": self.family(self.spikes(60, 0.3)),
            "60 at once 300 ms": self.family(self.spikes(60, 0.5), budgets_ms=(300,)),
            "tight 50 ms 1.2": self.family(self.gamma(1.2), budgets_ms=(50,)),
            "loose 500 ms 1.5": self.family(self.gamma(1.5), budgets_ms=(500,)),
            "mixed deadlines 1.5": self.family(self.gamma(1.5), budgets_ms=mixed),
            "mixed caps 1.2": self.family(self.gamma(1.2), capped=True),
            "noisy 0.6": self.family(self.gamma(0.6), neighbour=True, bar="noisy neighbour"),
            "noisy 1.0": self.family(self.gamma(1.0), neighbour=True, bar="noisy neighbour"),
            "noisy 1.0 CV2=4": self.family(self.gamma(1.0, 4), neighbour=True, bar="noisy neighbour"),
            "all at once 0.7": self._everything(0.7),
            "all at once 1.5": self._everything(1.5),
            "deep 2 s, caps, 3.0": self.family(self.gamma(3.0), budgets_ms=(2000,), capped=True),
            "overload 3.5": self.family(self.gamma(3.5)),
            "overload 4.5": self.family(self.gamma(4.5), bar="overload"),
            "overload 4.5 mixed": self.family(self.gamma(4.5), budgets_ms=mixed, bar="overload"),
        }

    def _everything(self, load: float) -> Family:
        times, budgets_ms = self.gamma(load, 4), (50, 100, 200, 500)
        return self.family(times, budgets_ms=budgets_ms, capped=True, neighbour=True, bar="everything at once")


def read_profile(latencies: Path | None, checkpoint: Path | None) -> tuple[ProfileTable, LatencyTable]:
    """Return DeiT-S as published with the anchors' latencies, or a checkpoint's profile and measured latencies."""
    _, config, top1 = PUBLISHED["deit"]
    measured = zip(config.subnetworks, top1, strict=True)
    rows = tuple(SubNetworkProfile(sub, count_macs(config, sub), round(share / 100, 4)) for sub, share in measured)
    profiles = ProfileTable(rows) if checkpoint is None else load_checkpoint(checkpoint).profile
    seconds: dict[SubNetwork, tuple[float, ...]] = defaultdict(tuple)
    if latencies is not None:
        cells = sorted(json.loads(latencies.read_text())["rows"], key=lambda cell: cell["batch_size"])
        for cell in cells:
            seconds[SubNetwork(cell["patch_grid"], cell["keep_rate"])] += (cell["median_ms"] / 1000,)
        return profiles, LatencyTable(tuple(sorted({cell["batch_size"] for cell in cells})), seconds)
    macs = [count_macs(config, sub) for sub in ANCHORS_MS]
    for row in rows:
        one, eight = (float(np.interp(row.macs, macs, ms)) / 1000 for ms in zip(*ANCHORS_MS.values(), strict=True))
        seconds[row.subnetwork] = (one, eight, eight + (eight - one) * 8 / 7)
    return profiles, LatencyTable(BATCH_SIZES, seconds)


def main() -> None:
    """Replay all families, then print the table, the bars and the decision times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latencies", type=Path, help="JSON of measured latencies instead of the study's")
    parser.add_argument("--checkpoint", type=Path, help="whose accuracies; DeiT-S as published by default")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each family")
    parser.add_argument("--seconds", type=float, default=20.0, help="virtual time of each family")
    parser.add_argument("--policies", help="comma-separated; level and slackfit are always there; all by default")
    parser.add_argument("--families", default="", help="only those whose name contains this")
    options = parser.parse_args()
    catalog = VariantCatalog.of(*read_profile(options.latencies, options.checkpoint))
    chosen = options.policies.split(",") if options.policies else policy_names(catalog)
    policies = tuple(dict.fromkeys(("level", "slackfit", *chosen)))
    figures: dict[str, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    decisions: dict[str, list[tuple[float, int]]] = defaultdict(list)
    bars: dict[str, str] = {}
    for seed in range(options.seeds):
        for name, family in Draw(catalog, seed, options.seconds).families().items():
            if options.families not in name:
                continue
            bars[name] = family.bar
            for policy in policies:
                found = find_policy(policy, catalog)
                timed = Timed(found.make(catalog, 16))
                machine = Machine(catalog, slowdown=family.slowdown)
                replayed = Replay(family.arrivals, machine, replace(found, make=partial(_always, timed)))
                figures[name][policy].append(Figures.of([replayed], catalog))
                decisions[policy] += timed.decisions
            print(".", end="", flush=True)
    print_table(figures, policies)
    print_bars(figures, policies, bars)
    print_costs(figures, policies, decisions)


Results = Mapping[str, Mapping[str, list[Figures]]]  # by family and policy, one per seed


def effective(figures: Sequence[Figures]) -> float:
    """Return the mean effective accuracy in percent, or the attainment if the profile has no accuracies."""
    shares = [one.slo_attainment if one.effective_accuracy is None else one.effective_accuracy for one in figures]
    return 100 * float(np.mean(shares))


def print_table(results: Results, policies: Sequence[str]) -> None:
    """Print a row per family: effective accuracy and, in brackets, attainment; of the fixed policies only the best."""
    fixed = [policy for policy in policies if policy.startswith("fixed-")]
    shown = [policy for policy in policies if policy not in fixed]
    print("\neffective accuracy in % (SLO attainment in %), mean of the seeds")
    print(f"{'':20}" + "".join(f"{policy:>18}" for policy in [*shown, *(["best fixed"] if fixed else [])]))
    for family, row in results.items():
        best = [max(fixed, key=lambda policy: effective(row[policy]))] if fixed else []
        attained = {policy: 100 * np.mean([one.slo_attainment for one in row[policy]]) for policy in policies}
        cells = [f"{effective(row[policy]):10.2f} ({attained[policy]:5.1f})" for policy in [*shown, *best]]
        print(f"{family:20}" + "".join(cells), *best)
    means = [np.mean([effective(row[policy]) for row in results.values()]) for policy in shown]
    print(f"{'mean':20}" + "".join(f"{mean:10.2f}        " for mean in means))


def print_bars(results: Results, policies: Sequence[str], bars: Mapping[str, str]) -> None:
    """Print whether `level` passes its bars, and every family where another policy beats it."""
    for rival in (policy for policy in policies if policy == "slackfit" or policy.startswith("fixed-")):
        shares = {name: effective(row["level"]) / max(effective(row[rival]), 1e-9) for name, row in results.items()}
        worst = min(shares, key=shares.__getitem__)
        print_bar(f"at least {SHARE_BAR:.0%} of {rival} on each family", shares[worst] - SHARE_BAR, f"at {worst}")
    for bar, points in BARS.items():
        leads = [
            effective(row["level"]) - effective(row["slackfit"]) for name, row in results.items() if bar in bars[name]
        ]
        if leads:
            print_bar(f"{points} points above slackfit: {bar or 'over all'}", float(np.mean(leads)) - points)
    for name, row in results.items():
        lead_of = {policy: effective(row[policy]) - effective(row["level"]) for policy in policies}
        ahead = sorted((policy for policy in policies if lead_of[policy] > 0.01), key=lead_of.__getitem__, reverse=True)
        if ahead:
            print(f"level loses at {name} to " + ", ".join(f"{policy} by {lead_of[policy]:.2f}" for policy in ahead))


def print_bar(what: str, margin: float, where: str = "") -> None:
    print(f"{'pass' if margin >= 0 else 'FAIL'}  {what}, margin {margin:+.3f} {where}")


def print_costs(
    results: Results, policies: Sequence[str], decisions: Mapping[str, Sequence[tuple[float, int]]]
) -> None:
    """Print how often each policy changes the sub-network, and how long its decisions take."""
    print(f"{'':20}changes/s  decision us: median     p99     max at waiting")
    for policy in policies:
        changes = np.mean([one.changes_per_s for row in results.values() for one in row[policy]])
        p50, p99 = np.percentile([microseconds for microseconds, _ in decisions[policy]], (50, 99))
        most, waiting = max(decisions[policy])
        print(f"{policy:20}{changes:9.1f}  {p50:19.0f} {p99:7.0f} {most:7.0f} {waiting:10}")


if __name__ == "__main__":
    main()
