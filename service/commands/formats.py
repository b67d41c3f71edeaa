"""Output formats for answers: a table and text for people, JSON lines and CSV for programs. Sends no requests."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

from rich.columns import Columns
from rich.console import Console
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from models.files.checkpoint_errors import MESSAGE_CHARACTERS, printable_text
from service.http.schemas import ClassifyAnswer

Format = Literal["table", "text", "json", "csv"]
Show = Callable[[Path, ClassifyAnswer], None]

DEFAULT_TOP_K: dict[Format, int] = {"table": 1, "text": 5, "json": 5, "csv": 1}
COLUMNS = ("photo", "rank", "label", "probability", "patch_grid", "keep_rate", "gflops", "total_ms", "deadline_met")
BAR_CHARACTERS, NAME_CHARACTERS, WIDEST_TABLE = 8, 22, 100


def default_format() -> Format:
    """Choose the table on a terminal, text elsewhere: what a program reads must not depend on a terminal's width."""
    return "table" if sys.stdout.isatty() else "text"


def readable(text: object) -> str:
    """Escape control characters, which a terminal would obey, in a file's name or a server's text, and shorten it."""
    return printable_text(text, MESSAGE_CHARACTERS)


def showing(style: Format) -> AbstractContextManager[Show]:
    """Yield a function that shows an answer on stdout; the output is complete once the block ends."""
    return {"table": _table, "text": _text, "json": _json, "csv": _csv}[style]()


@contextmanager
def progress(photos: int, style: Format) -> Iterator[Callable[[], None]]:
    """Show a progress bar for several photos on stderr, unless answers on the same terminal would break it up."""
    console = Console(stderr=True)
    is_off = photos < 2 or not console.is_terminal or (style != "table" and sys.stdout.isatty())
    with Progress(console=console, transient=True, disable=is_off, redirect_stdout=False) as bar:
        task = bar.add_task("classifying", total=photos)
        yield lambda: bar.advance(task)


@contextmanager
def _text() -> Iterator[Show]:
    def show(photo: Path, answer: ClassifyAnswer) -> None:
        print(readable(photo))
        for entry in answer.predictions:
            print(f"  {entry.probability:6.1%}  {readable(entry.label)}")
        late = "" if answer.deadline_met else ", too late"
        print(f"  {readable(answer.decision.reason)} ({answer.timing_ms.total:.1f} ms{late})")

    yield show


@contextmanager
def _json() -> Iterator[Show]:
    def show(photo: Path, answer: ClassifyAnswer) -> None:
        print(json.dumps({"photo": str(photo)} | answer.model_dump(mode="json")))

    yield show


@contextmanager
def _csv() -> Iterator[Show]:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)

    def show(photo: Path, answer: ClassifyAnswer) -> None:
        subnetwork = answer.subnetwork
        cost = (subnetwork.patch_grid, subnetwork.keep_rate, answer.gflops, answer.timing_ms.total, answer.deadline_met)
        for rank, entry in enumerate(answer.predictions, start=1):
            writer.writerow((readable(photo), rank, readable(entry.label), entry.probability, *cost))

    yield show


@contextmanager
def _table() -> Iterator[Show]:
    """Print all rows together at the end, even after Ctrl-C: the column widths are known only then."""
    console = Console()
    table = Table(box=None, pad_edge=False, expand=True, width=min(console.width, WIDEST_TABLE))
    table.add_column("photo", overflow="ellipsis", no_wrap=True, ratio=3)
    table.add_column("answer", overflow="ellipsis", no_wrap=True, ratio=2)
    table.add_column("probability", width=BAR_CHARACTERS + 7)
    for title in ("grid-keep", "GFLOPs", "ms"):
        table.add_column(title, justify="right", no_wrap=True, style="dim")

    def show(photo: Path, answer: ClassifyAnswer) -> None:
        ran = answer.subnetwork
        took = Text(f"{answer.timing_ms.total:.0f}", style="" if answer.deadline_met else "red")
        columns = (f"{ran.patch_grid}-{ran.keep_rate:g}", f"{answer.gflops:.3g}", took)
        for rank, entry in enumerate(answer.predictions):
            bar = ProgressBar(1, entry.probability, BAR_CHARACTERS, complete_style="cyan", finished_style="cyan")
            likely = Columns([Text(f"{entry.probability:6.1%}"), bar])
            name, told = (_last(readable(photo)), columns) if rank == 0 else ("", ("",) * len(columns))
            table.add_row(Text(name), Text(readable(entry.label)), likely, *told)

    try:
        yield show
    finally:
        if table.row_count:
            console.print(table)


def _last(name: str) -> str:
    """Cut off the beginning of a long path: the paths of photos differ at the end."""
    return name if len(name) <= NAME_CHARACTERS else f"…{name[1 - NAME_CHARACTERS :]}"
