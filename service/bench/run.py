"""Behind `supervit bench`: photographs are sent to a server, and how it did is printed, written and drawn."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Protocol

from rich.console import Console

from service.bench.connections import Connections
from service.bench.figures import Figures
from service.bench.generator import Exchange, Planned, open_loop
from service.bench.options import STDOUT, Bench
from service.bench.photos import Photo, read_photos
from service.bench.table import table_of
from service.bench.wires import Reply, Request, SupervitWire, V2Wire, Wire
from service.errors import CommandError, NoAnswerError

PATIENCE_S = 10.0  # after the longest budget: an answer that comes later still counts among the latencies


class Sender(Protocol):
    """What carries requests to a server and answers back, as `Connections` do."""

    async def send(self, request: Request) -> tuple[int, bytes]:
        """Send a request; returns the status and the body of the answer."""


Connect = Callable[[str, float], AbstractAsyncContextManager[Sender]]


@dataclass(frozen=True, slots=True)
class Run:
    """One rate, per second, and what became of its requests in so many seconds."""

    rate: float
    exchanges: list[Exchange]
    duration_s: float

    @property
    def figures(self) -> Figures:
        """What the run says."""
        return Figures.of(self.rate, self.exchanges, self.duration_s)


def bench(command: Bench, console: Console, connect: Connect = Connections) -> None:
    """Send a server requests at every rate, and print, write and draw what it made of them.

    Args:
        command: what is sent.
        console: that the table is printed on.
        connect: opens connections to a URL, whose requests may take so many seconds.

    Raises:
        CommandError: there are no photographs, or the model takes none.
        InvalidParameterError: no request arrives, or too many.
        NoAnswerError: the server cannot be reached.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: there is no matplotlib to draw with.
    """
    for path in filter(None, (command.json_file, command.plot_file)):
        if path != STDOUT:
            path.touch()  # fails now rather than after the measurement
    runs = asyncio.run(measure(command, connect))
    figures = [run.figures for run in runs]
    if command.json_file is not None:
        options = command.model_dump(mode="json", exclude_none=True)
        text = json.dumps({"options": options, "runs": [asdict(each) for each in figures]}, indent=2) + "\n"
        if command.json_file == STDOUT:
            console.out(text, end="", highlight=False)
        else:
            command.json_file.write_text(text)
    if command.json_file != STDOUT:
        console.print(table_of(figures))
    if command.plot_file is not None:
        from models.evaluation.plots import plot_bench  # matplotlib comes with an extra only

        courses = {f"{run.rate:.4g}/s": [_point(exchange) for exchange in run.exchanges] for run in runs}
        plot_bench(courses, command.plot_file)


async def measure(command: Bench, connect: Connect) -> list[Run]:
    """Send the requests of every rate, one rate after the other."""
    photos = await asyncio.to_thread(read_photos, command.images, command.seed)
    drawn = list(command.draws_at(command.rates))
    longest_s = max(arrival.budget_s for _, arrivals in drawn for arrival in arrivals)
    runs = []
    async with connect(command.url, longest_s + PATIENCE_S) as sender:
        wire = await _wire(command, sender, photos)
        encoded = await asyncio.to_thread(lambda: [wire.encode(photo.data) for photo in photos])

        async def ask(planned: Planned) -> Reply:
            try:
                return wire.read(*await sender.send(wire.request(encoded[planned.photo], planned.arrival)))
            except NoAnswerError as error:
                return Reply(error.code)

        for rate, arrivals in drawn:
            places = [number % len(photos) for number in range(len(arrivals))]
            plan = [
                Planned(arrival, place, photos[place].label) for arrival, place in zip(arrivals, places, strict=True)
            ]
            duration_s = command.duration_s if command.trace is None else max(1.0, arrivals[-1].at)
            runs.append(Run(rate, await open_loop(plan, ask), duration_s))
    return runs


async def _wire(command: Bench, sender: Sender, photos: Sequence[Photo]) -> Wire:
    """Find the server, so that no load is sent to nobody, and what it takes."""
    path = "/health/ready" if command.model is None else V2Wire.path(command.model)
    status, body = await sender.send(Request(path))
    if status != HTTPStatus.OK:
        raise CommandError(f"{command.url}{path} answers with status {status}, so nothing can be asked there")
    if command.model is None:
        return SupervitWire()
    return V2Wire(command.model, body, sorted({photo.label for photo in photos if photo.label is not None}))


def _point(exchange: Exchange) -> tuple[float, float | None, bool]:
    latency_s = exchange.latency_s if exchange.reply.is_answer else None
    return exchange.planned.arrival.at, latency_s, exchange.is_in_time
