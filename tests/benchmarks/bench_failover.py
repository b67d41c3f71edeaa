"""What clients see while a replica dies: `python -m tests.benchmarks.bench_failover IMAGES`.

Two replicas of deploy/ray run on this machine under a Poisson load; one of them is killed with SIGKILL after a third of
the run. The next run starts on the same cluster, once the replica has been replaced. Needs `pip install '.[ray]'`.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from tests.benchmarks.bench_live import poisson, read_pictures
from tests.deploy.ray_cluster import Answer, environment, load_and_kill, ray_cluster, serve_config

PORT = 18231
STEP_S = 1.0


def by_second(answers: Sequence[Answer], seconds: float, budget_ms: float) -> None:
    print("| second | requests | in time | expected top-1 |\n|---|---|---|---|")
    for step in range(round(seconds / STEP_S)):
        sent = [answer for answer in answers if step * STEP_S <= answer.sent_s < (step + 1) * STEP_S]
        answered = [answer for answer in sent if answer.status == 200]
        in_time = sum(answer.latency_s <= budget_ms / 1000 for answer in answered)
        accuracy = mean(answer.expected_accuracy for answer in answered) if answered else 0
        print(f"| {step * STEP_S:g} | {len(sent)} | {in_time / max(1, len(sent)):.1%} | {accuracy:.2%} |")


def main() -> None:
    """Run the load, and print the answers second by second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--rate", type=float, default=120, help="requests per second")
    parser.add_argument("--budget-ms", type=float, default=500)
    parser.add_argument("--seconds", type=float, default=24)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    images = [picture.data for picture in read_pictures(options.images, 200)]
    settings = {} if options.checkpoint is None else {"checkpoint": str(options.checkpoint.resolve())}
    with ray_cluster(serve_config(PORT, replicas=2, **settings), environment()) as cluster:
        for run in range(options.runs):
            while len(cluster.replicas()) < 2:
                time.sleep(1)
            arrivals, kill_at_s = poisson(options.rate, options.seconds, run), options.seconds / 3
            answers = asyncio.run(load_and_kill(cluster, images, arrivals, options.budget_ms, kill_at_s))
            outcomes = Counter(answer.status for answer in answers)
            twice = sum(answer.request_ids != (f"request-{answer.number}",) for answer in answers)
            print(f"run {run + 1}: {len(answers)} requests, answers {dict(outcomes)}, without one or twice {twice};")
            print(f"a replica was killed at {kill_at_s:g} s")
            by_second(answers, options.seconds, options.budget_ms)


if __name__ == "__main__":
    main()
