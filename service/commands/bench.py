"""The `bench` command: sends traffic to a server with `service.bench`; prints, writes and plots the figures."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.files.checkpoint_errors import printable_text
from service.bench.connections import Connections
from service.bench.figures import Figures
from service.bench.generator import Exchange
from service.bench.measure import Connect, measure
from service.bench.options import STDOUT, Bench
from service.settings import API_KEY_VARIABLE, environment_variable

SHOWN = 3  # sub-networks of the mix that the table lists, the most frequent ones
# 99th percentile of the generator's lateness above which the table warns: half of a tight budget on a fast server. A
# generator that is later than that measures itself.
LATE_MS = 10.0


def bench(command: Bench, console: Console | None = None, connect: Connect | None = None) -> None:
    """Send requests to a server at every rate, and show the figures.

    Args:
        command: the options: what to send, and where.
        console: prints the table; stdout by default.
        connect: as in `measure`, whose errors are raised, too; by default with the key in SUPERVIT_API_KEY.

    Raises:
        OSError: a file cannot be written.
        ModuleNotFoundError: a plot is asked for and matplotlib is not installed.
    """
    if command.plot_file is not None:
        from models.evaluation.plots import plot_bench  # matplotlib comes with an extra only
    console = console or Console()
    connect = connect or partial(Connections, api_key=environment_variable(API_KEY_VARIABLE))
    for path in filter(None, (command.json_file, command.plot_file)):
        if path != STDOUT:
            path.touch()  # fails now rather than after the measurement
    runs = asyncio.run(measure(command, connect))
    figures = [run.figures for run in runs]
    options = command.model_dump(mode="json", exclude_none=True)
    text = json.dumps({"options": options, "runs": [asdict(each) for each in figures]}, indent=2) + "\n"
    if command.json_file == STDOUT:
        console.out(text, end="", highlight=False)
    else:
        console.print(table_of(figures))
        if command.json_file is not None:
            command.json_file.write_text(text)
    if command.plot_file is not None:
        courses = {f"{run.rate:.4g}/s": [_point(exchange) for exchange in run.exchanges] for run in runs}
        plot_bench(courses, command.plot_file)


def _point(exchange: Exchange) -> tuple[float, float | None, bool]:
    latency_s = exchange.latency_s if exchange.reply.is_answer else None
    return exchange.planned.arrival.at, latency_s, exchange.is_in_time


def table_of(figures: Sequence[Figures]) -> Table:
    """Lay out figures, one column per rate; control characters in texts from the server are escaped."""
    table = Table(title="open loop, times from when each request was due", caption=_caption(figures))
    table.add_column("requests/s")
    for each in figures:
        table.add_column(f"{each.rate:.4g}", justify="right")
    columns = [_cells(each) for each in figures]
    for name in columns[0]:
        if any(column[name] for column in columns):
            table.add_row(name, *(Text(column[name] or "-") for column in columns))
    return table


def _cells(figures: Figures) -> dict[str, str]:
    latencies = figures.latency_ms or {}
    return {
        "sent": f"{figures.sent}",
        "answered": f"{figures.answered}",
        "in time": f"{figures.attainment:.2%}",
        "in time per second": f"{figures.goodput_per_s:.4g}",
        **{
            f"{name} ms": f"{latencies[name]:.1f}" if latencies else "" for name in ("mean", "p50", "p90", "p99", "max")
        },
        "correct, of those answered": _share(figures.accuracy),
        "correct and in time, of all": _share(figures.effective_accuracy),
        "GFLOPs per answer": "" if figures.mean_gflops is None else f"{figures.mean_gflops:.3g}",
        "answered by": "\n".join(
            f"{printable_text(name)} {share:.0%}" for name, share in list(figures.mix.items())[:SHOWN]
        ),
        "not answered": _counts(figures.failures),
        "send delay p99 ms": f"{figures.late_p99_ms:.1f}",
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _counts(failures: Mapping[str, int]) -> str:
    return "\n".join(f"{printable_text(code)} {count}" for code, count in failures.items())


def _caption(figures: Sequence[Figures]) -> str | None:
    if max(each.late_p99_ms for each in figures) <= LATE_MS:
        return None
    return "The load generator could not keep up, so latencies include its delay; lower the rate or use another machine"
