"""The figures of a run as a table for a terminal, a column for each rate. rich enters the benchmark here."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from models.files.checkpoint_errors import shown
from service.bench.figures import Figures

SHOWN = 3  # sub-networks of the mix
# Half of what is a tight budget on a fast server: a generator that is later than that measures itself.
LATE_MS = 10.0


def table_of(figures: Sequence[Figures]) -> Table:
    """Lay figures out; what a server has said is shown without its control characters."""
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
        "right, of those answered": _share(figures.accuracy),
        "right and in time, of all": _share(figures.effective_accuracy),
        "GFLOPs each": "" if figures.mean_gflops is None else f"{figures.mean_gflops:.3g}",
        "answered by": "\n".join(f"{shown(name)} {share:.0%}" for name, share in list(figures.mix.items())[:SHOWN]),
        "not answered": _counts(figures.failures),
        "sent late by, p99 ms": f"{figures.late_p99_ms:.1f}",
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _counts(failures: Mapping[str, int]) -> str:
    return "\n".join(f"{shown(code)} {count}" for code, count in failures.items())


def _caption(figures: Sequence[Figures]) -> str | None:
    if max(each.late_p99_ms for each in figures) <= LATE_MS:
        return None
    return "The load generator could not keep up: latencies are its own in part. Send less, or from another machine."
