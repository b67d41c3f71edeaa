"""The collaborators of the routes: the served models, the metrics and the limits of requests."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.checkpoint import Checkpoint
from service.access.key_file import KeyFile
from service.classifier import Classifier
from service.domain import ServerState
from service.errors import NotReadyError
from service.execution.explainer import Explainer
from service.health import ServerFailures
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
    """The parts of a model that is ready to answer.

    Attributes:
        pipeline: answers requests.
        scheduler: holds the queue of the requests.
        describe_subnetworks: lists the sub-networks with their latencies as known by now.
        measured_share: returns the fraction of these latencies that is measured, 0..1.
        explainer: returns the patches that the model kept of an image.
    """

    pipeline: Pipeline
    scheduler: Scheduler
    describe_subnetworks: Callable[[], SubNetworksAnswer]
    measured_share: Callable[[], float]
    explainer: Explainer

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the model that answers."""
        return self.pipeline.checkpoint


@dataclass(frozen=True, slots=True)
class RouteContext:
    """The collaborators of the routes.

    Attributes:
        checkpoints: returns the checkpoints that answer requests, the one that answers most of them first.
        metrics: metrics of the server.
        monitor: observes the machine.
        bodies: limits of request bodies.
        classifier: classifies images, and counts the requests.
        answers: recent answers, on which clients may give feedback.
        cors_origins: sites whose pages may send requests, besides the server's own.
        allowed_hosts: host names that requests may be addressed to; None for any.
        state: returns the state of the server.
        server: returns the model that answers most requests; raises a NotReadyError until there is one.
        servers: returns the models that may answer a request, the one drawn for it first; errors as `server`.
        report: records the state of machine and scheduler in the metrics.
        reporter: logs and traces each request; None where there are only metrics.
        clock: monotonic, in seconds.
        failures: counts consecutive requests that failed by the server's own fault.
        keys: API keys, one of which a request must carry; None where none is required.
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
    failures: ServerFailures = field(default_factory=ServerFailures)
    keys: KeyFile | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that answers most requests."""
        return self.checkpoints()[0]

    def open_server(self) -> ReadyServer:
        """Return the model that answers a request that arrives now.

        Raises:
            NotReadyError: the server takes no requests yet, or no more.
        """
        return self.open_servers()[0]

    def open_servers(self) -> Sequence[ReadyServer]:
        """Return the models that may answer a request, the drawn one first; any other is for requests that name it."""
        servers = self.servers()
        if self.state() is not ServerState.READY:
            raise NotReadyError("the server is stopping; try again in a moment")
        return servers
