"""What second looks gain: over the frontier of single looks, and in virtual time under every family of arrivals.

python -m tests.benchmarks.bench_cascades CHECKPOINT [--latencies FILE.json] [--seeds 3] [--seconds 20]
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from models.profiles import ProfileTable
from service.scheduling.catalog import VariantCatalog
from service.scheduling.policies import Policy, find_policy
from service.scheduling.variants import Variant
from service.simulation.simulator import Figures, Machine, Replay
from tests.benchmarks.bench_policies import Draw, Timed, effective, read_profile

# The families in which load and capacity are close, so that the time saved on one image helps another.
MIDDLE_LOAD = (
    "poisson 1.0", "poisson 1.5", "poisson 2.5", "gamma CV2=2 1.5", "gamma CV2=4 1.0", "gamma CV2=8 1.0",
    "gamma CV2=8 1.5", "on/off 0-2.2", "tight 50 ms 1.2", "loose 500 ms 1.5", "mixed deadlines 1.5", "mixed caps 1.2",
    "noisy 0.6", "noisy 1.0", "noisy 1.0 CV2=4", "all at once 0.7", "all at once 1.5",
)  # fmt: skip


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="evaluated, with cascades")
    parser.add_argument("--latencies", type=Path, help="JSON of measured latencies; DeiT-S's with AMX by default")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each family")
    parser.add_argument("--seconds", type=float, default=20.0, help="virtual time of each family")
    options = parser.parse_args()
    profiles, latencies = read_profile(options.latencies, options.checkpoint)
    single, cascading = (VariantCatalog.of(profiles, latencies, cascades=given) for given in (False, True))
    print_frontier(single.levels, cascading.levels, profiles)
    print_replays(single, cascading, options.seeds, options.seconds)


def print_frontier(single: Sequence[Variant], joint: Sequence[Variant], profiles: ProfileTable) -> None:
    """Compare accuracy at equal mean GFLOPs, and GFLOPs at the accuracy of the largest sub-network."""
    for variant in joint:
        print(f"{variant.gflops:8.4f} GFLOPs {100 * (variant.top1 or 0):6.2f} %  {variant}")
    lowest, highest = single[0].gflops, profiles.rows[-1].gflops
    costs = np.linspace(lowest + (highest - lowest) / 4, highest - (highest - lowest) / 4, 400)
    gain = [accuracy_within(joint, cost) - accuracy_within(single, cost) for cost in costs]
    print(f"over the middle half of the costs: {np.mean(gain):+.2f} points at equal mean GFLOPs")
    largest = profiles.rows[-1]
    enough = [variant.gflops for variant in joint if (variant.top1 or 0) >= (largest.top1 or 0)]
    share = f"{enough[0] / largest.gflops:.3f}" if enough else "more than 1"
    print(f"the largest sub-network's accuracy, {100 * (largest.top1 or 0):.2f} %, for {share} of its GFLOPs")


def accuracy_within(levels: Sequence[Variant], gflops: float) -> float:
    """Return the accuracy in percent of the best level whose mean cost is at most `gflops`."""
    return 100 * max(level.top1 or 0 for level in levels if level.gflops <= gflops)


def print_replays(single: VariantCatalog, cascading: VariantCatalog, seeds: int, seconds: float) -> None:
    """Replay the same arrivals with and without cascades."""
    figures: dict[str, dict[bool, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    decisions: list[tuple[float, int]] = []
    for seed in range(seeds):
        for name, family in Draw(single, seed, seconds).families().items():
            for catalog in (single, cascading):
                policy = find_policy("level", catalog)
                timed = Timed(policy.make(catalog, 16))
                asked: Policy = replace(policy, make=partial(_always, timed))
                replayed = Replay(family.arrivals, Machine(catalog, slowdown=family.slowdown, seed=seed), asked)
                figures[name][catalog is cascading].append(Figures.of([replayed], catalog))
                decisions += timed.decisions if catalog is cascading else []
    print(f"{'':20}   effective accuracy, %: without    with   gain   in time, %: without   with  looked again")
    for name, row in figures.items():
        before, after = effective(row[False]), effective(row[True])
        attained = [100 * np.mean([one.slo_attainment for one in row[given]]) for given in (False, True)]
        again = 100 * np.mean([one.looked_again for one in row[True]])
        accuracy = f"{before:34.2f}{after:8.2f}{after - before:+7.2f}"
        print(f"{name:20}{accuracy}{attained[0]:22.2f}{attained[1]:7.2f}{again:13.1f} %")
    gains = {name: effective(row[True]) - effective(row[False]) for name, row in figures.items()}
    mean, middle = np.mean(list(gains.values())), np.mean([gains[name] for name in MIDDLE_LOAD])
    print(f"gain: {mean:+.2f} over all, {middle:+.2f} at middle load, {min(gains.values()):+.2f} where it is least")
    print("decisions, us: median {:.0f}, p99 {:.0f}".format(*np.percentile([each for each, _ in decisions], (50, 99))))


def _always(decide: Timed, _catalog: VariantCatalog, _max_batch_size: int) -> Timed:
    return decide


if __name__ == "__main__":
    main()
