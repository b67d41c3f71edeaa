"""Assembles the components of a model that is about to take requests: scheduler, batcher, decoder, pipeline."""

import copy
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.supervit import SuperViT
from service.decoding import images
from service.decoding.decoder import Decoder
from service.engines.base import Engine
from service.engines.factory import EngineChoice, engine_threads
from service.engines.growing_profile import GrowingProfile, Prediction, untimed_shapes
from service.engines.profile_files import ProfileFile
from service.engines.profile_store import extended_profile
from service.engines.profiler import cells_of, stopwatch
from service.execution.audit import Audit
from service.execution.batcher import Batcher
from service.execution.engine_thread import EngineThread
from service.execution.explainer import Explainer
from service.execution.idle_profiling import IdleProfiler
from service.execution.idle_turns import IdleTurns, IdleWork
from service.execution.live_sample import LiveSample
from service.execution.throttle import UtilizationLimiter
from service.http.context import ReadyServer
from service.http.descriptions import describe_subnetworks
from service.http.schemas import SubNetworksAnswer
from service.machine.monitor import Monitor
from service.machine.snapshot import prior_slowdown
from service.pipeline import Pipeline
from service.scheduling.catalog import VariantCatalog
from service.scheduling.key_ledger import KeyLedger
from service.scheduling.policies import find_policy
from service.scheduling.scheduler import Scheduler
from service.settings import Settings
from service.telemetry.metrics import Metrics

ProfileWithFile = tuple[GrowingProfile, ProfileFile]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A model that can answer, with the components that bring requests to it.

    Attributes:
        checkpoint: the model.
        engine: runs its batches.
        known: its latencies on this machine.
        server: the part of it that the routes use.
        batcher: takes turns on the engine's thread.
        decoder: decodes the images of its requests.
        sample: a sample of its recent answers.
        announce: tells the metrics and the keys' ledger that this model is served now.
    """

    checkpoint: Checkpoint
    engine: Engine
    known: ProfileWithFile | LatencyTable
    server: ReadyServer
    batcher: Batcher
    decoder: Decoder
    sample: LiveSample
    announce: Callable[[], None]

    @property
    def is_unused(self) -> bool:
        """Whether it has finished every request that it received, explanations included."""
        return not self.server.pipeline.num_at_work and not self.server.explainer.is_taken

    def take_over(self, other: "ServedModel") -> None:
        """Take over what another model's pipeline has learned while serving; none of it depends on the model."""
        self.server.pipeline.take_over(other.server.pipeline)

    async def serve(self) -> None:
        """Answer requests until the batcher is stopped and has answered all of them; errors as `Batcher.serve`."""
        try:
            await self.batcher.serve()
        finally:
            self.close()

    def close(self) -> None:
        """Let the threads of the explainer and the decoder end once their work is done."""
        self.server.explainer.close()
        self.decoder.close()


def engine_choice(settings: Settings, checkpoint: Checkpoint, cores: float) -> EngineChoice:
    """Return the choice of the settings for a checkpoint, where this process may use so many cores."""
    threads = settings.threads or engine_threads(checkpoint, cores)
    return EngineChoice(settings.engine, settings.device, settings.precision, threads)


def assemble(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: Engine,
    engine_thread: EngineThread,
    *,
    metrics: Metrics,
    monitor: Monitor,
    threads: int,
    ledger: KeyLedger,
    known: ProfileWithFile | LatencyTable,
) -> ServedModel:
    """Create the components of a model and connect them.

    Args:
        settings: the settings of the server.
        checkpoint: the model.
        engine: runs the batches.
        engine_thread: the thread on which the engine computes.
        metrics: the metrics of the server.
        monitor: observes the machine.
        threads: number of threads of the engine, on a CPU.
        ledger: records the work done for each API key.
        known: the latencies on this machine: a profile to be completed and its file, or a table to be trusted.
    """
    latencies = known if isinstance(known, LatencyTable) else known[0].predict().likely
    catalog = VariantCatalog.of(extended_profile(checkpoint), latencies, cascades=settings.cascades)
    policy = find_policy(settings.policy, catalog)
    if settings.cascades and not checkpoint.profile.cascades:
        logger.warning("%s has no cascades: --cascades has no effect", checkpoint.name)
    scheduler = Scheduler(
        catalog,
        policy.make(catalog, settings.max_batch_size),
        settings.max_batch_size,
        rejects_early=policy.rejects_early,
        lock=threading.RLock(),
    )
    limiter = UtilizationLimiter(settings.max_utilization, None if engine.is_on_gpu else monitor.latest.cores)

    def observe_machine() -> float:
        """Report other processes' load and the GPU's free memory to the scheduler; return their share of the CPUs."""
        latest = monitor.latest
        load = 1.0 if engine.is_on_gpu else prior_slowdown(latest, threads)
        scheduler.machine_observed(load, engine.fitting_images())
        return 0.0 if engine.is_on_gpu else (latest.others_cores or 0.0) / (latest.cpus or latest.cores)

    # Audits come first: they are bounded, while completing a profile may take hours.
    works: list[IdleWork] = [Audit(engine.run, scheduler, metrics.audits.audited)] if settings.audit else []
    profiler = None
    if not isinstance(known, LatencyTable):
        profiler = _make_profiler(settings, checkpoint, engine, scheduler, *known)
        works.append(profiler)
    idle = IdleTurns(works, scheduler, settings.default_budget_ms / 1000, limiter, observe_machine)
    sample = LiveSample()
    batcher = Batcher(
        engine.run,
        scheduler,
        engine_thread,
        limiter=limiter,
        idle=idle,
        sample=sample,
        observe_machine=observe_machine,
        observe_batch=metrics.batch_ran,
    )
    decoder = _make_decoder(settings, checkpoint)
    pipeline = Pipeline(
        scheduler=scheduler,
        checkpoint=checkpoint,
        decoder=decoder,
        batcher=batcher,
        max_in_flight=settings.max_in_flight,
        default_budget_ms=settings.default_budget_ms,
        ledger=ledger,
    )

    def describe() -> SubNetworksAnswer:
        measured_at = "not measured here"
        if not isinstance(known, LatencyTable):
            measured_at = known[0].began_at.isoformat(timespec="seconds")
        return describe_subnetworks(
            checkpoint, scheduler.catalog, engine.describe(), measured_at, latencies.batch_sizes
        )

    def measured_share() -> float:
        return 1.0 if profiler is None else profiler.measured_share

    def announce() -> None:
        metrics.model.serves(checkpoint.name, checkpoint.version)
        if not isinstance(known, LatencyTable):
            metrics.profile.began(checkpoint.name, known[0].began_at, catalog.best.top1)
        ledger.answer_gflops = catalog.least_gflops

    explainer = Explainer(_model_to_explain(checkpoint, engine), decoder, ledger)
    server = ReadyServer(pipeline, scheduler, describe, measured_share, explainer)
    return ServedModel(checkpoint, engine, known, server, batcher, decoder, sample, announce)


def _model_to_explain(checkpoint: Checkpoint, engine: Engine) -> SuperViT:
    """Return the engine's own model, or a copy on the CPU where the engine uses a GPU.

    No other thread may use a GPU while it captures a graph.
    """
    model = checkpoint.model
    return copy.deepcopy(model).to("cpu", torch.float32) if engine.is_on_gpu else model


def _make_decoder(settings: Settings, checkpoint: Checkpoint) -> Decoder:
    open_image = partial(
        images.open_image,
        config=checkpoint.config,
        max_pixels=settings.max_image_pixels,
        max_memory_bytes=settings.max_decode_bytes,
    )
    return Decoder(open_image, settings.decode_threads, settings.max_decode_bytes, settings.max_decode_s_per_address)


def _make_profiler(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: Engine,
    scheduler: Scheduler,
    profile: GrowingProfile,
    file: ProfileFile,
) -> IdleProfiler:
    """Create the profiler that completes a profile in idle moments and publishes it to the scheduler."""
    catalog, image_side = scheduler.catalog, checkpoint.config.image_side
    if engine.pads_batches:  # the trained sub-networks are prepared at start-up
        untrained = [row.subnetwork for row in extended_profile(checkpoint).rows if not row.is_trained]
        shapes = cells_of(untrained, profile.batch_sizes)
    else:
        levels = dict.fromkeys(subnetwork for level in catalog.levels for subnetwork in level.subnetworks)
        shapes = untimed_shapes(list(levels), profile.batch_sizes)

    def publish(latencies: Prediction) -> None:
        likely, cautious = latencies.likely, latencies.cautious
        scheduler.profile_refined(catalog.with_latencies(likely), catalog.with_latencies(cautious))

    return IdleProfiler(
        profile,
        file,
        stopwatch(engine.run, image_side, settings.max_batch_size, time.monotonic, engine.prepare),
        publish,
        shapes,
    )
