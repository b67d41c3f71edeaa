"""The requests that a simulation replays and a load generator sends: drawn at random or read from a trace.

For simulations, also a script of the machine's slowdown.

Every draw is seeded: the same options give the same requests.
"""

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidParameterError

MAX_REQUESTS = 2_000_000
MAX_TRACE_S = 1e7  # about 116 days; larger values are probably dates
# Columns of a trace: what a value must be, and the check for it.
COLUMNS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "seconds": (f"a number from 0, the start, to {MAX_TRACE_S:,.0f}", lambda value: 0 <= value <= MAX_TRACE_S),
    "budget_ms": ("a positive number", lambda value: 0 < value < math.inf),
    "budget_gflops": ("a positive number", lambda value: value > 0),
    "priority": ("an integer", float.is_integer),
}

Shape = Literal["poisson", "gamma", "step", "ramp", "bursts"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Row = dict[str, float]  # a row of a trace, by column
Rng = np.random.Generator
Script = Annotated[str, AfterValidator(lambda text: SlowdownScript.parse(text) and text)]


class TraceError(InvalidParameterError):
    """A trace is invalid; the message names the file and, where one is at fault, the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """The arrival of a request.

    Attributes:
        at: seconds from the start.
        budget_s: latency budget, from arrival to deadline.
        budget_gflops: most GFLOPs that the request may cost; None for no limit.
        priority: 0 is normal; lower may be shed first.
    """

    at: float
    budget_s: float
    budget_gflops: float | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class SlowdownScript:
    """How much longer than its profile a batch takes, by the instant at which it starts.

    Attributes:
        steps: seconds from the start, ascending, each with the factor from then on; the factor is 1 before the first.

    Raises:
        ValueError: a step is out of order or out of range.
    """

    steps: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        instants = [at for at, _ in self.steps]
        if instants != sorted(set(instants)):
            raise ValueError(f"the seconds of a slowdown script must ascend: {instants}")
        if not all(math.isfinite(at) and at >= 0 and 0 < factor < math.inf for at, factor in self.steps):
            raise ValueError("the seconds of a slowdown script must be at least 0 and its factors greater than 0")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read seconds:factor pairs, such as "10:2.5,20:1".

        Raises:
            ValueError: the text is not such a script.
        """
        steps = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            try:
                at, factor = map(float, part.split(":"))
            except ValueError as error:
                raise ValueError(f"{part!r} must have the form seconds:factor, such as 10:2.5") from error
            steps.append((at, factor))
        return cls(tuple(steps))

    def factor(self, at: float) -> float:
        """Return the factor at an instant."""
        index = bisect_right(self.steps, (at, math.inf))
        return self.steps[index - 1][1] if index else 1.0


class Arrivals(BaseModel):
    """Options of the traffic, at rates that the caller of `draws_at` gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arrivals: Shape = Field(
        "poisson",
        description="poisson; gamma: burstier, see cv2; step: at the peak from half time on; ramp: rising to the peak; "
        "bursts: at the peak every other burst-s",
    )
    rate: tuple[Positive, ...] | None = Field(
        None, min_length=1, description="requests per second, before any peak; several run one after the other"
    )
    duration_s: float = Field(60, gt=0, le=MAX_TRACE_S, description="time in which requests arrive")
    cv2: float = Field(4, ge=0.01, le=100, description="gamma: squared coefficient of variation of the gaps")
    peak: float = Field(3, gt=0, le=1000, description="step, ramp and bursts: peak as a multiple of the rate")
    burst_s: float = Field(1, gt=0, description="bursts: seconds of each burst, and of each pause between two bursts")
    trace: Path | None = Field(
        None,
        description="file of requests to replay instead: seconds from the start, one per line, or a CSV file with a "
        "column seconds and optionally budget_ms, budget_gflops and priority",
    )
    budget_ms: tuple[Positive, ...] = Field(
        (100,), min_length=1, description="latency budgets; from several, each request draws one"
    )
    budget_gflops: tuple[Positive, ...] | None = Field(
        None,
        min_length=1,
        description="maximum cost of a request; from several, each request draws one; no limit by default",
    )
    priority: tuple[Annotated[int, Field(le=0)], ...] = Field(
        (0,),
        min_length=1,
        description="0 is normal; lower ones may be rejected or shed first; from several, each request draws one",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all random draws")

    @model_validator(mode="after")
    def _has_one_source_of_rates(self) -> Self:
        given = [name for name in ("rate", "load", "trace") if getattr(self, name, None) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are mutually exclusive")
        return self

    def draws_at(self, rates: Sequence[float]) -> Iterator[tuple[float, list[Arrival]]]:
        """Yield each rate, per second, with the requests drawn at it; for a trace, its mean rate and its requests.

        Raises:
            InvalidParameterError: there are too many requests, or none.
            OSError: the trace cannot be read.
            TraceError: the trace is invalid.
        """
        if self.trace is not None:
            rows = read_trace(self.trace)
            yield len(rows) / max(1.0, rows[-1]["seconds"]), self._with_budgets(rows)
            return
        for rate in rates:
            rows = [{"seconds": at} for at in self._draw(rate)]
            if not rows:
                raise InvalidParameterError(f"no request arrives at {rate:g} per second", parameter="rate")
            yield rate, self._with_budgets(rows)

    def _draw(self, rate: float) -> list[float]:
        end_s, peak = self.duration_s, rate * self.peak
        rates: dict[str, Callable[[float], float]] = {
            "step": lambda at: peak if at >= end_s / 2 else rate,
            "ramp": lambda at: rate + (peak - rate) * at / end_s,
            "bursts": lambda at: peak if int(at / self.burst_s) % 2 else rate,
        }
        highest = max(rate, peak) if self.arrivals in rates else rate
        if highest * end_s > MAX_REQUESTS:
            message = f"{highest:g} per second are more than {MAX_REQUESTS:,} requests in total"
            raise InvalidParameterError(message, parameter="rate")
        rng = np.random.default_rng([self.seed, 0])
        if self.arrivals in rates:
            return varying(rates[self.arrivals], highest, end_s, rng)
        return gamma(rate, self.cv2 if self.arrivals == "gamma" else 1.0, end_s, rng)

    def _with_budgets(self, rows: Sequence[Row]) -> list[Arrival]:
        rng = np.random.default_rng([self.seed, 1])
        drawn = zip(
            rng.choice(self.budget_ms, len(rows)).tolist(),
            rng.choice(self.budget_gflops or (math.inf,), len(rows)).tolist(),
            rng.choice(self.priority, len(rows)).tolist(),
            strict=True,
        )
        names = ("budget_ms", "budget_gflops", "priority")
        return [_arrival(dict(zip(names, values, strict=True)) | row) for values, row in zip(drawn, rows, strict=True)]


class Traffic(Arrivals):
    """Options of the traffic for machines of known capacity, and of the slowdown of these machines."""

    load: tuple[Positive, ...] | None = Field(
        None,
        min_length=1,
        description="rates as multiples of the most accurate sub-network's throughput on all machines; 1 by default",
    )
    slowdown: Script = Field(
        "",
        description="seconds:factor, e.g. 10:2.5,20:1: from 10 s to 20 s, batches take 2.5 times as long as profiled",
    )

    def draws(self, capacity: float) -> Iterator[tuple[float, list[Arrival]]]:
        """Yield what `draws_at` does, at the given rates or at multiples of a capacity in requests per second."""
        return self.draws_at(self.rate or [load * capacity for load in self.load or (1.0,)])


def _arrival(row: Row) -> Arrival:
    limit = row["budget_gflops"] if row["budget_gflops"] < math.inf else None
    return Arrival(row["seconds"], row["budget_ms"] / 1000, limit, int(row["priority"]))


def gamma(rate: float, cv2: float, duration_s: float, rng: Rng) -> list[float]:
    """Draw instants whose gaps follow a gamma distribution: a Poisson process at cv2 = 1, burstier above.

    Args:
        rate: requests per second on average.
        cv2: squared coefficient of variation of the gaps, which is 1 over the distribution's shape.
        duration_s: exclusive upper bound of the instants.
        rng: the random generator to draw with.
    """
    times, at = list[float](), 0.0
    while True:
        for gap in rng.gamma(1 / cv2, cv2 / rate, size=max(16, int(rate * duration_s / 4))).tolist():
            at += gap
            if at >= duration_s:
                return times
            times.append(at)


def varying(rate_at: Callable[[float], float], highest: float, duration_s: float, rng: Rng) -> list[float]:
    """Draw instants of a Poisson process whose rate varies, at most `highest` per second (thinning, Lewis 1979)."""
    candidates = gamma(highest, 1.0, duration_s, rng)
    draws = rng.random(len(candidates)).tolist()
    return [at for at, draw in zip(candidates, draws, strict=True) if draw * highest < rate_at(at)]


def read_trace(path: Path) -> list[Row]:
    """Read the requests of a CSV file, in the order of their instants; empty cells are left out.

    Raises:
        OSError: the file cannot be read.
        TraceError: the file is not a valid trace.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, ["seconds"] if _is_number(file.readline()) else None, strict=True)
            file.seek(0)
            columns = list(reader.fieldnames or ())
            if "seconds" not in columns or len(set(columns)) != len(columns) or not set(columns) <= set(COLUMNS):
                raise TraceError(f"{path}, line 1: columns must be seconds and any of {', '.join(COLUMNS)}, each once")
            rows = [_read_row(f"{path}, line {reader.line_num}", cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path} is not a CSV file: {error}") from error
    if not 0 < len(rows) <= MAX_REQUESTS:
        raise TraceError(f"{path} has {len(rows):,} requests; it must have 1 to {MAX_REQUESTS:,}")
    return sorted(rows, key=lambda row: row["seconds"])


def _is_number(line: str) -> bool:
    with suppress(ValueError):
        float(line)
        return True
    return False


def _read_row(where: str, cells: dict[str, str]) -> Row:
    if None in cells or None in cells.values():  # how DictReader reports surplus and missing cells
        raise TraceError(f"{where}: the numbers of cells and columns differ")
    row = {}
    for column, cell in cells.items():
        if column != "seconds" and not cell.strip():
            continue
        what, is_valid = COLUMNS[column]
        try:
            row[column] = float(cell)
        except ValueError as error:
            raise TraceError(f"{where}: {column} must be {what}, not {cell!r}") from error
        if not is_valid(row[column]):
            raise TraceError(f"{where}: {column} must be {what}, not {cell!r}")
    return row
