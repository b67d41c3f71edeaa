"""The composition root: wires every room once around one checkpoint."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from torch import Tensor

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.api import CLASSIFY_PATH, Api, Serving, build_router, make_classify
from service.baselines import make_policy, refuses_early
from service.batcher import Batcher, Run
from service.decoding import Decoder
from service.engine import Engine
from service.engines import make_engine
from service.errors import NotReadyError
from service.estimates import prior_slowdown
from service.guard import until_hung
from service.http_errors import ErrorAnswers
from service.images import decode_image
from service.line import Line
from service.menu import Menu
from service.metrics import Metrics, process_registry
from service.monitor import Monitor
from service.pacer import Pacer
from service.pipeline import Pipeline
from service.profiler import Measurement, load_or_measure, rehearse
from service.request_ids import RequestIds
from service.schemas import describe_family
from service.settings import Settings, environment_variable
from service.shared_counts import SHARED_FOLDER_VARIABLE
from service.shortcut import Shortcut

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # and the largest, whatever that is
SMALL_GFLOPS = 0.3
PREPARATION_S = 30.0  # a step of it that takes ten times as long is taken to hang


def create_app(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: Engine | None = None,
    latencies: LatencyTable | None = None,
    on_failure: Callable[[], None] = lambda: None,
    heartbeat: Callable[[bool], None] = lambda _: None,
    *,
    ready_first: bool = False,
    names_requests: bool = True,
) -> FastAPI:
    """Wire the service.

    Args:
        settings: every knob.
        checkpoint: what to serve.
        engine: runs the batches; the one that the settings name by default.
        latencies: of every sub-network on this machine; from the profile folder, or measured, by default.
        on_failure: called once the model cannot run at all, as after a failed warm-up, or when a batch never ends; the
            server should then end. In the latter case `app.state.is_hung()` is true and a thread of it never ends.
        heartbeat: called every second on the event loop, with whether requests are served.
        ready_first: take no request before the model can answer it, for where others answer meanwhile.
        names_requests: send back an X-Request-ID, for where no proxy does.

    Raises:
        DeviceError: the device or the engine cannot be used.
        InvalidParameterError: there is no policy of that name.
    """
    monitor = Monitor()
    threads = settings.threads or engine_threads(checkpoint, monitor)
    engine = engine or make_engine(settings.engine, checkpoint.model, settings.device, threads)
    profiles = extended_profile(checkpoint)
    make_policy(settings.policy, Menu.of(profiles, nominal_latencies(profiles)), 1)  # a wrong name fails at once
    metrics = Metrics(process_registry(), environment_variable(SHARED_FOLDER_VARIABLE))
    metrics.describe(list(profiles.by_subnetwork), checkpoint.name, checkpoint.version, settings.workers)
    api = Api(checkpoint, metrics, monitor, settings.max_body_bytes, settings.max_upload_s)
    service = _Service(settings, checkpoint, engine, latencies, api, threads)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(monitor.run(settings.monitor_interval_s))
        reporting = asyncio.create_task(api.report_regularly(settings.monitor_interval_s))
        guarding = asyncio.create_task(guard())
        serving = asyncio.create_task(service.serve())
        serving.add_done_callback(on_end)
        logger.info("serving %s %s with %s", checkpoint.name, checkpoint.version, engine.describe())
        try:
            if ready_first:
                waiting = asyncio.create_task(service.is_serving.wait())
                await asyncio.wait((serving, guarding, waiting), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
            yield
        finally:
            service.stop()
            await asyncio.wait((serving, guarding), return_when=asyncio.FIRST_COMPLETED)
            watching.cancel()
            reporting.cancel()
            guarding.cancel()
            monitor.close()

    async def guard() -> None:
        expected_s = await until_hung(lambda: service.running_batch, lambda: heartbeat(service.is_serving.is_set()))
        logger.critical("a batch that should take %.3g s does not end; ending without it", expected_s)
        service.abandon()
        on_failure()

    def on_end(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            logger.critical("the model cannot run: %s", error, exc_info=error)
            api.drain()
            on_failure()

    app = FastAPI(title="SuperViT Serve", version=version("supervit-serve"), lifespan=lifespan, redoc_url=None)
    app.state.drain, app.state.totals, app.state.is_hung = service.drain, metrics.totals, lambda: service.is_hung
    classify, errors = make_classify(api), ErrorAnswers(settings.max_body_bytes, api.count_refusal)
    app.include_router(build_router(api, classify))
    app.add_middleware(Shortcut, path=CLASSIFY_PATH, handle=errors.around(classify))
    if names_requests:
        app.add_middleware(RequestIds)
    errors.add_to(app)
    return app


def engine_threads(checkpoint: Checkpoint, monitor: Monitor) -> int:
    """Choose how many threads the engine gets by default: one for each core that this process may use.

    A model so small that HTTP takes more of a request than inference does leaves one core to HTTP. On two cores the
    default checkpoint then answered 85 % in time at a load at which it had answered 63 %, one run of 6 s each.
    """
    cores = math.ceil(monitor.latest.cores)
    largest = checkpoint.profile.by_subnetwork[checkpoint.config.largest]
    return max(1, cores - 1) if largest.gflops < SMALL_GFLOPS else cores


def extended_profile(checkpoint: Checkpoint) -> ProfileTable:
    """Return the profile of a checkpoint with keep rates between those that it was trained at."""
    return checkpoint.profile.with_rates_between(checkpoint.config)


def nominal_latencies(profiles: ProfileTable) -> LatencyTable:
    """Pretend that every batch takes a millisecond: for where nobody waits in line and nothing need be measured."""
    return LatencyTable((1,), dict.fromkeys(profiles.by_subnetwork, (0.001,)))


def measure_latencies(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: Engine,
    run: Run,
    *,
    fresh: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Read this machine's latencies of every sub-network from the profile folder, or else measure them with `run`."""
    return load_or_measure(
        settings.profile_folder,
        run,
        image_side=checkpoint.config.image_side,
        subnetworks=tuple(extended_profile(checkpoint).by_subnetwork),
        batch_sizes=(*(size for size in BATCH_SIZES if size < settings.max_batch_size), settings.max_batch_size),
        checkpoint_version=checkpoint.version,
        engine=engine.describe(),
        fresh=fresh,
        is_stopping=is_stopping,
    )


class _Service:
    """What runs between the start and the end of the app: first the preparation, then the batches."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        engine: Engine,
        latencies: LatencyTable | None,
        api: Api,
        threads: int,
    ) -> None:
        self._settings, self._checkpoint, self._engine = settings, checkpoint, engine
        self._latencies, self._api, self._threads = latencies, api, threads
        self._engine_thread = ThreadPoolExecutor(1, "engine")
        self._decode_threads = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._is_stopping = False
        self.is_hung = False
        self._batcher: Batcher | None = None
        self._preparing: tuple[float, float] | None = None
        self.is_serving = asyncio.Event()

    async def serve(self) -> None:
        """Warm up, learn the latencies, and run batches until `stop` is called and everyone admitted has an answer."""
        try:
            latencies, measured_at = await asyncio.get_running_loop().run_in_executor(
                self._engine_thread, self._prepare
            )
            if not self._is_stopping:
                self._batcher = self._assemble(latencies, measured_at)
                self.is_serving.set()
                await self._batcher.serve()
        except NotReadyError:
            logger.info("stopped before the first request")
        finally:
            self._engine_thread.shutdown(wait=not self.is_hung)
            self._decode_threads.shutdown()

    @property
    def running_batch(self) -> tuple[float, float] | None:
        """What `until_hung` wants to know."""
        return self._preparing if self._batcher is None else self._batcher.running

    def abandon(self) -> None:
        """Refuse newcomers and release those who wait for an engine that hangs."""
        self.is_hung = True
        self._api.drain()
        if self._batcher is not None:
            self._batcher.abandon()

    def drain(self) -> None:
        """Refuse newcomers; where the preparation is not over, give it up. For signal handlers: it sets flags alone."""
        self._api.drain()
        if self._batcher is None:
            self._is_stopping = True

    def stop(self) -> None:
        """Refuse newcomers; let `serve` end."""
        self._api.drain()
        self._is_stopping = True
        if self._batcher is not None:
            self._batcher.stop()

    def _prepare(self) -> tuple[LatencyTable, str]:
        self._goes_on()
        self._engine.warm_up()
        if self._latencies is not None:
            return self._latencies, "not measured here"
        settings, checkpoint, run = self._settings, self._checkpoint, self._run_unless_stopping
        measured = measure_latencies(settings, checkpoint, self._engine, run, is_stopping=lambda: not self._goes_on())
        best = Menu.of(extended_profile(checkpoint), measured.table).best
        self._api.metrics.profiled(checkpoint.name, datetime.fromisoformat(measured.measured_at), best.row.top1)
        rehearse(run, checkpoint.config.image_side, checkpoint.config.subnetworks, settings.max_batch_size)
        return measured.table, measured.measured_at

    def _run_unless_stopping(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        if not self._goes_on():
            raise NotReadyError("the server is stopping")
        return self._engine.run(images, subnetwork)

    def _goes_on(self) -> bool:
        """Note that the preparation gets on, if only with waiting for another process, and tell whether it should."""
        self._preparing = time.monotonic(), PREPARATION_S
        return not self._is_stopping

    def _assemble(self, latencies: LatencyTable, measured_at: str) -> Batcher:
        settings, metrics, monitor = self._settings, self._api.metrics, self._api.monitor
        menu = Menu.of(extended_profile(self._checkpoint), latencies)
        policy = make_policy(settings.policy, menu, settings.max_batch_size)
        line = Line(menu, policy, settings.max_batch_size, refuses_early=refuses_early(settings.policy))
        cores = None if self._engine.is_on_gpu else monitor.latest.cores
        batcher = Batcher(
            self._engine.run,
            line,
            self._engine_thread,
            self._decode_threads,
            pacer=Pacer(settings.max_utilization, cores),
            observe_machine=partial(self._observe_machine, line),
            observe_batch=metrics.batch_ran,
        )
        decode = partial(decode_image, config=self._checkpoint.config, max_pixels=settings.max_image_pixels)
        pipeline = Pipeline(
            line=line,
            class_names=self._checkpoint.class_names,
            decoder=Decoder(decode, settings.decode_threads, time.monotonic),
            batcher=batcher,
            metrics=metrics,
            max_in_flight=settings.max_in_flight,
            default_budget_ms=settings.default_budget_ms,
        )
        family = describe_family(self._checkpoint, menu, self._engine.describe(), measured_at, latencies.batch_sizes)
        self._api.serve(Serving(pipeline, line, family))
        return batcher

    def _observe_machine(self, line: Line) -> None:
        """Tell the line what others' load and the GPU's free memory mean for it."""
        if not self._engine.is_on_gpu:
            line.prior_slowdown = prior_slowdown(self._api.monitor.latest, self._threads)
        fitting = self._engine.fitting_images()
        if fitting is not None:
            line.max_batch_size = min(fitting, line.menu.max_batch_size, self._settings.max_batch_size)
