"""Runs a server from its start to its end: the preparation, then the batches. Connects all components once."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from models.checkpoint import Checkpoint, load_checkpoint
from models.files.sources import find_checkpoint
from models.latency import LatencyTable
from service.access.key_file import KeyFile
from service.assembly import ProfileWithFile, ServedModel, assemble, engine_choice
from service.candidate import CandidateMaker, Load, OpenEngine
from service.checkpoint_watch import CheckpointWatch, follow
from service.classifier import Classifier, ClientLimiter
from service.domain import ServerState
from service.engines.base import Engine
from service.engines.candidate_engine import open_candidate
from service.engines.factory import open_engine
from service.engines.profile_store import begin_profile, extended_profile, nominal_latencies
from service.errors import NotReadyError
from service.execution.engine_thread import EngineThread
from service.execution.watchdog import Watchdog
from service.http.context import RouteContext
from service.http.uploads import BodyLimits
from service.inference_protocol.protocol import InferenceProtocol
from service.machine.monitor import Monitor
from service.model_changer import ModelChanger
from service.preparation import Preparation
from service.recent_answers import RecentAnswers
from service.scheduling.catalog import VariantCatalog
from service.scheduling.key_ledger import KeyLedger
from service.scheduling.policies import find_policy
from service.served_models import ServedModels
from service.settings import Settings, comma_separated, environment_variable
from service.telemetry.metrics import Metrics, process_registry
from service.telemetry.multiprocess import SHARED_FOLDER_VARIABLE
from service.telemetry.reports import Reporter

if TYPE_CHECKING:  # it imports opentelemetry
    from service.telemetry.tracing import RequestTracer

logger = logging.getLogger(__name__)

LEAST_FLUSH_S, MOST_FLUSH_S = 1.0, 5.0  # to flush the last spans, within what is left of the time to drain


class ServerRuntime:
    """One server: its state, its threads, and what `create_app` serves.

    Attributes:
        context: what the routes use.
        metrics: the metrics of the server.
        inference_protocol: answers the Open Inference Protocol, over any transport.
        coming: counts by client the images on their way to the server, over any protocol.
        changer: replaces the served model by another one.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        engine: Engine | None = None,
        latencies: LatencyTable | None = None,
        *,
        on_failure: Callable[[], None] = lambda: None,
        heartbeat: Callable[[bool], None] = lambda _: None,
        begin: Callable[..., ProfileWithFile] = begin_profile,
        load: Load = load_checkpoint,
        open_candidate: OpenEngine = open_candidate,
        changes_refused: str | None = None,
        monitor: Monitor | None = None,
        watchdog: Watchdog | None = None,
        tracer: "RequestTracer | None" = None,
    ) -> None:
        """Create a server; nothing runs yet.

        Args:
            settings: the settings of the server.
            checkpoint: the model to serve.
            engine: runs the batches; by default the one that the settings name.
            latencies: of every sub-network on this machine; by default some are measured first and the rest when idle.
            on_failure: called once the model cannot run at all, as after a failed warm-up, or when a batch never ends;
                the server should then end. In the latter case it is HUNG, and one of its threads never ends.
            heartbeat: called at every check of the watchdog on the event loop, with whether requests are served.
            begin: reads the latencies measured before, and measures those that a start needs.
            load: reads the checkpoints of later model changes.
            open_candidate: creates the engines of these checkpoints.
            changes_refused: why operators may not request a model change; None where they may.
            monitor: observes the machine.
            watchdog: decides when a batch counts as hung.
            tracer: traces requests; closed when the server ends.

        Raises:
            DeviceError: the device or the engine cannot be used.
            InvalidParameterError: there is no policy of that name.
        """
        self._settings, self._latencies = settings, latencies
        self._on_failure, self._heartbeat = on_failure, heartbeat
        self._monitor, self._watchdog = monitor or Monitor(), watchdog or Watchdog()
        choice = engine_choice(settings, checkpoint, self._monitor.latest.cores)
        if engine is None:
            engine, checkpoint = open_engine(checkpoint, choice)
        self._first: tuple[Engine, Checkpoint] | None = engine, checkpoint  # until it is served: others may replace it
        profile = extended_profile(checkpoint)
        catalog = VariantCatalog.of(profile, nominal_latencies(profile), cascades=settings.cascades)
        find_policy(settings.policy, catalog)  # an unknown one fails at once
        self.metrics = Metrics(process_registry(), environment_variable(SHARED_FOLDER_VARIABLE))
        self.metrics.describe(list(profile.by_subnetwork), checkpoint.name, checkpoint.version, settings.workers)
        answers, self.coming = RecentAnswers(), ClientLimiter(settings.max_in_flight_per_address, "being received")
        self.context = RouteContext(
            checkpoints=self._checkpoints,
            metrics=self.metrics,
            monitor=self._monitor,
            bodies=BodyLimits(settings.max_body_bytes, settings.max_upload_s, self.coming),
            classifier=Classifier(self.metrics, settings.max_in_flight_per_address, answers),
            answers=answers,
            cors_origins=comma_separated(settings.cors_origins) or (),
            allowed_hosts=comma_separated(settings.allowed_hosts),
            keys=None if settings.keys is None else KeyFile(settings.keys),
            state=lambda: self._state,
            server=lambda: self._models.main.server,
            servers=lambda: [model.server for model in self._models.drawn()],
            report=self._report,
            reporter=Reporter(tracer, logs_requests=settings.log_requests) if tracer or settings.log_requests else None,
        )
        self.inference_protocol = InferenceProtocol(
            self._checkpoints,
            self.metrics,
            self.context.classifier,
            self.context.failures,
            lambda: [server.pipeline for server in self.context.open_servers()],
        )
        self._tracer, self._state, self._threads = tracer, ServerState.STARTING, choice.threads
        self._drain_ends_at: float | None = None
        self._models, self._engine_thread, self._became_ready = ServedModels(), EngineThread(), asyncio.Event()
        self._ledger = KeyLedger(catalog.least_gflops, 1 / settings.workers, self.metrics.keys.spent)
        maker = CandidateMaker(
            settings,
            self._engine_thread,
            self.metrics,
            self._monitor,
            self._ledger,
            load=load,
            open_candidate=open_candidate,
            begin=begin,
            is_stopping=lambda: self._state is not ServerState.READY,
        )
        self.changer = ModelChanger(self._models, maker, self.metrics, refusal=changes_refused)
        self._preparation = Preparation(
            begin,
            settings.profile_folder,
            settings.max_batch_size,
            self._watchdog.preparation_s,
            lambda: self._state is ServerState.STARTING,
        )

    @property
    def state(self) -> ServerState:
        """The lifecycle state of the server."""
        return self._state

    @property
    def drain_left_s(self) -> float:
        """Seconds that the admitted requests may still take; all of `drain_s` before draining begins."""
        if self._drain_ends_at is None:
            return self._settings.drain_s
        return max(0.0, self._drain_ends_at - time.monotonic())

    def drain(self) -> None:
        """Take no new requests; cancel the preparation if it is not over.

        A signal handler calls it, perhaps while the interrupted code holds the lock of the metrics, so it updates none.
        """
        if self._state not in (ServerState.HUNG, ServerState.DRAINING):
            self._state, self._drain_ends_at = ServerState.DRAINING, time.monotonic() + self._settings.drain_s

    @asynccontextmanager
    async def running(self, *, ready_first: bool = False) -> AsyncIterator[None]:
        """Serve as long as the block lasts; with `ready_first`, enter it once the first request can be answered."""
        background = [
            self._report_regularly(),
            self._monitor.run(self._settings.monitor_interval_s),
            self.metrics.loop_delay.watch(),
            self._follow_checkpoint(),
            *(() if self.context.keys is None else (self.context.keys.watch(),)),
        ]
        guarding, serving, *others = map(asyncio.create_task, (self._guard(), self._serve(), *background))
        for task in (guarding, serving, *others):
            task.add_done_callback(self._on_end)
        self._say_what_is_served()
        try:
            if ready_first:
                waiting = asyncio.create_task(self._became_ready.wait())
                await asyncio.wait((serving, guarding, waiting), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            yield
        finally:
            self.drain()
            self.changer.close()
            self._models.stop()
            await asyncio.wait((serving, guarding), return_when=asyncio.FIRST_COMPLETED)
            for task in (guarding, *others):
                task.cancel()
            self._monitor.close()
            if self._tracer is not None:
                within_s = min(MOST_FLUSH_S, max(LEAST_FLUSH_S, self.drain_left_s))
                await asyncio.to_thread(self._tracer.close, within_s)

    async def _serve(self) -> None:
        """Warm up, learn the latencies, and run batches until stopped and all admitted requests are answered."""
        try:
            known = await asyncio.wrap_future(self._engine_thread.submit(self._prepare))
            if self._state is ServerState.STARTING:
                self._models.start(self._assemble(known))  # not bound to a name here, which would keep it alive
                self._models.main.announce()
                self._first = None
                self._state = ServerState.READY
                self.metrics.ready(True)
                self._became_ready.set()
                logger.info("ready for requests")
                await self._models.run()
        except NotReadyError:
            logger.info("stopped before the first request")
        finally:
            self._engine_thread.shutdown(wait=self._state is not ServerState.HUNG)

    async def _guard(self) -> None:
        """Wait until the engine hangs, then end the server without it."""
        expected_s = await self._watchdog.until_hung(
            self._running, lambda: self._heartbeat(self._state is ServerState.READY)
        )
        logger.critical("a batch expected to take %.3g s hangs; the server exits without waiting for it", expected_s)
        self._state = ServerState.HUNG
        self._models.abandon()
        self._on_failure()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            logger.critical("the server cannot run: %s", error, exc_info=error)
            self.drain()
            self._on_failure()

    def _running(self) -> tuple[float, float] | None:
        """Return when the current preparation step, batch or measurement began, and its expected seconds."""
        return self._preparation.running if self._models.is_empty else self._engine_thread.running

    def _prepare(self) -> ProfileWithFile | LatencyTable:
        return self._preparation.run(*self._require_first(), self._latencies)

    def _assemble(self, known: ProfileWithFile | LatencyTable) -> ServedModel:
        engine, checkpoint = self._require_first()
        return assemble(
            self._settings,
            checkpoint,
            engine,
            self._engine_thread,
            metrics=self.metrics,
            monitor=self._monitor,
            threads=self._threads,
            ledger=self._ledger,
            known=known,
        )

    def _checkpoints(self) -> list[Checkpoint]:
        return [self._require_first()[1]] if self._models.is_empty else [each.checkpoint for each in self._models.all]

    def _require_first(self) -> tuple[Engine, Checkpoint]:
        if self._first is None:
            raise NotReadyError("the server has stopped")
        return self._first

    def _say_what_is_served(self) -> None:
        engine, checkpoint = self._require_first()  # `running` would hold them until the server ends
        logger.info("serving %s %s with %s", checkpoint.name, checkpoint.version, engine.describe())

    async def _follow_checkpoint(self) -> None:
        if self._settings.watch_checkpoint:
            name, version = self._settings.checkpoint, self._require_first()[1].version
            await follow(name, lambda: CheckpointWatch(find_checkpoint(name), version, self.changer.begin))

    def _report(self) -> None:
        """Record the state of the machine and of the scheduler, for the next scrape of the metrics."""
        if not self._models.is_empty:
            main = self._models.main
            scheduler = main.server.scheduler
            state, queued = scheduler.state(time.monotonic()), len(scheduler)
            self.metrics.machine(self._monitor.latest, queued, state.slowdown, state.safety_factor)
            self.metrics.ready(self._state is ServerState.READY and not self.context.failures.is_persistent)
            self.metrics.profile.measured(main.checkpoint.name, main.server.measured_share())
            if captured := main.engine.captured():
                self.metrics.captured(captured.num_graphs, captured.held_bytes)

    async def _report_regularly(self) -> None:
        """Report until cancelled: with several workers, a scrape of the metrics reaches only one of them."""
        while True:
            await asyncio.sleep(self._settings.monitor_interval_s)
            self._report()
