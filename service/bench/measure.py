"""A measurement, from the options to the outcome of each request: combines photographs, arrivals and a server."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from service.bench.client_protocols import ClientProtocol, Reply, Request, SupervitProtocol, V2Protocol
from service.bench.connections import Connections
from service.bench.figures import Figures
from service.bench.generator import Exchange, Planned, open_loop
from service.bench.options import Bench
from service.bench.photos import Photo, read_photos
from service.errors import CommandError, NoAnswerError

GRACE_S = 10.0  # time limit beyond the longest budget: late answers still count among the latencies


class Sender(Protocol):
    """Carries requests to a server and answers back, as `Connections` does."""

    async def send(self, request: Request) -> tuple[int, bytes]:
        """Send a request, and return the status and the body of the answer."""


Connect = Callable[[str, float], AbstractAsyncContextManager[Sender]]


@dataclass(frozen=True, slots=True)
class Run:
    """One rate, in requests per second, and the exchanges of `duration_s` at it."""

    rate: float
    exchanges: list[Exchange]
    duration_s: float

    @property
    def figures(self) -> Figures:
        """The figures of the run."""
        return Figures.of(self.rate, self.exchanges, self.duration_s)


async def measure(command: Bench, connect: Connect = Connections) -> list[Run]:
    """Send the requests of every rate, one rate after the other.

    Args:
        command: the options: what to send, and where.
        connect: makes a sender to a URL, with a time limit for each request in seconds.

    Raises:
        CommandError: there are no photographs, the model takes no images, or the server is not ready.
        InvalidParameterError: the options give no request, or too many.
        NoAnswerError: the server cannot be reached.
        OSError: a file cannot be read.
    """
    photos = await asyncio.to_thread(read_photos, command.images, command.seed)
    drawn = list(command.draws_at(command.rates))
    longest_s = max(arrival.budget_s for _, arrivals in drawn for arrival in arrivals)
    runs = []
    async with connect(command.url, longest_s + GRACE_S) as sender:
        wire = await _wire(command, sender, photos)
        encoded = await asyncio.to_thread(lambda: [wire.encode(photo.data) for photo in photos])

        async def ask(planned: Planned) -> Reply:
            try:
                return wire.read(*await sender.send(wire.request(encoded[planned.photo], planned.arrival)))
            except NoAnswerError as error:
                return Reply(error.code)

        for rate, arrivals in drawn:
            plan = []
            for number, arrival in enumerate(arrivals):
                place = number % len(photos)
                plan.append(Planned(arrival, place, photos[place].label))
            duration_s = command.duration_s if command.trace is None else max(1.0, arrivals[-1].at)
            runs.append(Run(rate, await open_loop(plan, ask), duration_s))
    return runs


async def _wire(command: Bench, sender: Sender, photos: Sequence[Photo]) -> ClientProtocol:
    """Check that the server is ready, before any load is sent, and return the wire that it understands."""
    path = "/health/ready" if command.model is None else V2Protocol.path(command.model)
    status, body = await sender.send(Request(path))
    if status != HTTPStatus.OK:
        raise CommandError(f"{command.url}{path} answered with status {status}, so no requests are sent")
    if command.model is None:
        return SupervitProtocol()
    return V2Protocol(command.model, body, sorted({photo.label for photo in photos if photo.label is not None}))
