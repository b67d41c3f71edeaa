"""What the routes call upon: what is served, what is counted, and the limits of a request."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.checkpoint import Checkpoint
from service.access.key_file import KeyFile
from service.classifier import Classifier
from service.domain import ServerState
from service.errors import NotReadyError
from service.execution.explainer import Explainer
from service.health import OwnFailures
from service.http.schemas import SubNetworksAnswer
from service.http.uploads import BodyLimits
from service.machine.monitor import Monitor
from service.pipeline import Pipeline
from service.recent_answers import RecentAnswers
from service.scheduling.scheduler import Scheduler
from service.telemetry.metrics import Metrics
from service.telemetry.reports import Reporter


@dataclass(frozen=True, slots=True)
class ReadyServer:
    """What there is of a model once it can answer.

    Attributes:
        pipeline: takes requests to answers.
        scheduler: what they wait in.
        describe_family: lists the sub-networks with their latencies as known by now.
        measured_share: tells how much of these is measured, 0..1.
        explainer: tells which patches it kept.
    """

    pipeline: Pipeline
    scheduler: Scheduler
    describe_family: Callable[[], SubNetworksAnswer]
    measured_share: Callable[[], float]
    explainer: Explainer

    @property
    def checkpoint(self) -> Checkpoint:
        """What answers."""
        return self.pipeline.checkpoint


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What the routes call upon.

    Attributes:
        checkpoints: tells what is served, whatever is tried out beside it behind it.
        metrics: what is counted.
        monitor: looks at the machine.
        bodies: what those of requests may take.
        classifier: takes images to answers, and counts them.
        answers: those that clients may still come back to.
        cors_origins: sites whose pages may ask, beside the server's own.
        allowed_hosts: names that requests may be addressed to; None for any.
        state: tells what the server is at.
        server: yields what serves; raises a NotReadyError until there is one.
        servers: yields those that a request may be answered by, the one drawn for it first; errors as `server`.
        report: records the state of machine and scheduler in the metrics.
        reporter: tells of each request; None where nothing but the metrics does.
        clock: monotonic, in seconds.
        failures: counts the server's own.
        keys: that requests must come with one of; None for no such thing.
    """

    checkpoints: Callable[[], Sequence[Checkpoint]]
    metrics: Metrics
    monitor: Monitor
    bodies: BodyLimits
    classifier: Classifier
    answers: RecentAnswers
    cors_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...] | None
    state: Callable[[], ServerState]
    server: Callable[[], ReadyServer]
    servers: Callable[[], Sequence[ReadyServer]]
    report: Callable[[], None]
    reporter: Reporter | None = None
    clock: Callable[[], float] = time.monotonic
    failures: OwnFailures = field(default_factory=OwnFailures)
    keys: KeyFile | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """What is served."""
        return self.checkpoints()[0]

    def open_server(self) -> ReadyServer:
        """Return what answers a request that comes now.

        Raises:
            NotReadyError: requests are not taken yet, or no longer.
        """
        return self.open_servers()[0]

    def open_servers(self) -> Sequence[ReadyServer]:
        """Return what may answer it; the first has been drawn, the others are for requests that name them."""
        servers = self.servers()
        if self.state() is not ServerState.READY:
            raise NotReadyError("the server is stopping; try again in a moment")
        return servers
