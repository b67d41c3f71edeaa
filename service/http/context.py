"""What the routes call upon: what is served, what is counted, and the limits of a request."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from models.checkpoint import Checkpoint
from service.access.key_file import KeyFile
from service.classifier import Classifier
from service.domain import ServerState
from service.errors import NotReadyError
from service.execution.explainer import Explainer
from service.health import OwnFailures
from service.http.schemas import SubNetworksAnswer
from service.machine.monitor import Monitor
from service.pipeline import Pipeline
from service.recent_answers import RecentAnswers
from service.scheduling.scheduler import Scheduler
from service.telemetry.metrics import Metrics
from service.telemetry.reports import Reporter


@dataclass(frozen=True, slots=True)
class ReadyServer:
    """What there is once the server is ready.

    Attributes:
        pipeline: takes requests to answers.
        scheduler: what they wait in.
        describe_family: lists the sub-networks with their latencies as known by now.
        measured_share: tells how much of these is measured, 0..1.
    """

    pipeline: Pipeline
    scheduler: Scheduler
    describe_family: Callable[[], SubNetworksAnswer]
    measured_share: Callable[[], float]
    explainer: Explainer


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What the routes call upon.

    Attributes:
        checkpoint: what is served.
        metrics: what is counted.
        monitor: looks at the machine.
        max_body_bytes: most of a body that is read.
        max_upload_s: longest time that a body may take to arrive.
        classifier: takes images to answers, and counts them.
        answers: those that clients may still come back to.
        cors_origins: sites whose pages may ask, beside the server's own.
        allowed_hosts: names that requests may be addressed to; None for any.
        state: tells what the server is at.
        server: yields what serves; raises a NotReadyError until there is one.
        report: records the state of machine and scheduler in the metrics.
        reporter: tells of each request; None where nothing but the metrics does.
        clock: monotonic, in seconds.
        failures: counts the server's own.
        keys: that requests must come with one of; None for no such thing.
    """

    checkpoint: Checkpoint
    metrics: Metrics
    monitor: Monitor
    max_body_bytes: int
    max_upload_s: float
    classifier: Classifier
    answers: RecentAnswers
    cors_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...] | None
    state: Callable[[], ServerState]
    server: Callable[[], ReadyServer]
    report: Callable[[], None]
    reporter: Reporter | None = None
    clock: Callable[[], float] = time.monotonic
    failures: OwnFailures = field(default_factory=OwnFailures)
    keys: KeyFile | None = None

    def open_server(self) -> ReadyServer:
        """Return what serves, where it takes requests.

        Raises:
            NotReadyError: it does not yet, or no longer.
        """
        server = self.server()
        if self.state() is not ServerState.READY:
            raise NotReadyError("the server is stopping; try again in a moment")
        return server
