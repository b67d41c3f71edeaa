"""Prepares a candidate model while another one is served.

What takes a core for long runs with the lowest priority of the operating system. What uses the GPU, and batches, run a
step at a time on the engine's thread, between two batches of requests. A batch whose cores another thread of the same
priority needs takes several times as long: its parts wait for each other.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint
from models.files.sources import find_checkpoint
from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.assembly import ProfileWithFile, ServedModel, assemble, engine_choice
from service.engines.base import Engine
from service.engines.candidate_engine import open_candidate
from service.engines.profile_store import begin_profile, extended_profile, inherited_profile, measured_batch_sizes
from service.errors import ModelChangeError, NotReadyError
from service.execution.comparison import require_finite
from service.execution.engine_thread import EngineThread
from service.machine.monitor import Monitor
from service.scheduling.key_ledger import KeyLedger
from service.settings import Settings
from service.telemetry.metrics import Metrics

# Memory that a second model may take, as a multiple of its file: the weights in float32 and their compiled graphs, in
# this process and in the one that compiles them. That process took 660 MB for the default checkpoint, 44 MB in half
# precision, which has one graph in 8 bits and one in bfloat16; for the micro one, 2.8 MB, it took 510 MB.
MEMORY_OF_FILE = 10
MEMORY_BYTES = 500_000_000  # on top of that
REHEARSED_S = 0.02  # longest profiled time of a rehearsed batch, as requests may have to wait for it

Load = Callable[[Path], Checkpoint]
T = TypeVar("T")
OpenEngine = Callable[..., tuple[Engine, Checkpoint]]


class BetweenBatches:
    """Runs batches of an engine on the engine's thread, between those of requests, and counts the seconds they take.

    A batch may wait ten times as long as it takes; latencies must not include that.
    """

    def __init__(
        self,
        engine: Engine,
        between: Callable[[Callable[[], Any]], Any],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Create from the engine, what runs a step between two batches, and a monotonic clock in seconds."""
        self._engine, self._between, self._now = engine, between, clock
        self._seconds = 0.0

    def clock(self) -> float:
        """Return the seconds that the engine has worked on these batches."""
        return self._seconds

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Run a batch as `Engine.run` does, and wait for its end.

        Raises:
            NotReadyError: the server is stopping.
        """
        logits: Tensor = self._between(partial(self._timed, images, subnetwork))
        return logits

    def _timed(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        began_at = self._now()
        try:
            return self._engine.run(images, subnetwork)
        finally:
            self._seconds += self._now() - began_at


class CandidateMaker:
    """Makes models ready to be served; its methods block and should run on a separate thread.

    That thread keeps the normal priority of the operating system: a thread of a lower one that holds the GIL while
    others have the cores would block the event loop. So what should have the lowest priority runs in a process of its
    own, or without the GIL.
    """

    def __init__(
        self,
        settings: Settings,
        thread: EngineThread,
        metrics: Metrics,
        monitor: Monitor,
        ledger: KeyLedger,
        *,
        load: Load = load_checkpoint,
        open_candidate: OpenEngine = open_candidate,
        begin: Callable[..., ProfileWithFile] = begin_profile,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Create a maker from what candidates share with the served model.

        Args:
            settings: the settings of the server.
            thread: the thread on which engines compute.
            metrics: the metrics of the server.
            monitor: observes the machine.
            ledger: records the work done for each API key.
            load: reads a checkpoint.
            open_candidate: creates an engine for a checkpoint.
            begin: reads the latencies measured before, and measures those that are needed to begin.
            is_stopping: returns whether the server is stopping, which ends every step and every wait.
        """
        self._settings, self._thread, self._metrics, self._monitor = settings, thread, metrics, monitor
        self._ledger, self._load, self._open_candidate = ledger, load, open_candidate
        self._begin, self._is_stopping = begin, is_stopping

    def load(self, name: str) -> Checkpoint:
        """Load a checkpoint.

        Raises:
            CheckpointError: there is no checkpoint of that name, or it is broken.
            ModelChangeError: the free memory is too small for a second model of this size.
        """
        path = find_checkpoint(name)
        needed, free = MEMORY_OF_FILE * path.stat().st_size + MEMORY_BYTES, self._monitor.latest.memory_available_bytes
        if free is not None and needed > free:
            message = f"a second model of this size may take {needed / 1e6:.0f} MB; only {free / 1e6:.0f} MB are free"
            raise ModelChangeError(message)
        return self._load(path)

    def prepare(self, checkpoint: Checkpoint, served: ServedModel) -> ServedModel:
        """Compile a model, run each sub-network once, and look up or measure its latencies.

        Args:
            checkpoint: the candidate.
            served: the served model, whose latencies are taken over where they must be the same.

        Raises:
            DeviceError: no engine can run the model here.
            ModelChangeError: some logits of the model are not finite.
            NotReadyError: the server is stopping.
        """
        settings, cores = self._settings, self._monitor.latest.cores
        choice = engine_choice(settings, checkpoint, cores)
        served_threads = engine_choice(settings, served.checkpoint, cores).threads
        engine, checkpoint = self._open_candidate(checkpoint, choice, served_threads, self._is_stopping)
        between, config = self.between_batches(engine), checkpoint.config
        require_finite(between.run, config.image_side, config.subnetworks)
        if engine.is_on_gpu:
            self._prepare_gpu(engine, config.subnetworks)
        return assemble(
            settings,
            checkpoint,
            engine,
            self._thread,
            metrics=self._metrics,
            monitor=self._monitor,
            threads=choice.threads,
            ledger=self._ledger,
            known=self._latencies(checkpoint, engine, between, served),
        )

    def rehearse(self, model: ServedModel, served: ServedModel) -> None:
        """Run each batch shape that the served model ran recently, if its batch takes at most REHEARSED_S.

        A library prepares itself at the first batch of a shape, for milliseconds. That is negligible where batches take
        long. Where they take only a few milliseconds, it doubles the time of all batches that follow the change.

        Raises:
            NotReadyError: the server is stopping.
        """
        if model.engine.pads_batches:  # its batch shapes are fixed from the start
            return
        run, side = self.between_batches(model.engine).run, model.checkpoint.config.image_side
        alone = [variant for variant in model.server.scheduler.catalog.variants if variant.second_look is None]
        seconds = {variant.profile.subnetwork: variant.latency_by_batch_s for variant in alone}
        for subnetwork, size in served.sample.shapes():
            by_batch_s = seconds.get(subnetwork, ())
            if size <= len(by_batch_s) and by_batch_s[size - 1] <= REHEARSED_S:
                run(torch.zeros(size, 3, side, side, dtype=torch.uint8), subnetwork)

    def between_batches(self, engine: Engine) -> BetweenBatches:
        """Return what runs batches of an engine between those of requests."""
        return BetweenBatches(engine, self._between)

    def release(self, model: ServedModel) -> None:
        """Free the engine of a model that is not served; a GPU may be used by the engine's thread alone."""
        with suppress(NotReadyError):  # the server stops, which frees everything
            if model.engine.is_on_gpu:
                self._between(model.engine.close)
            else:
                model.engine.close()

    def _between(self, step: Callable[[], T]) -> T:
        """Run a step between two batches, and wait for its end.

        Raises:
            NotReadyError: the server is stopping.
        """
        if self._is_stopping():
            raise NotReadyError("the server is stopping")
        return self._thread.work(step).result()

    def _prepare_gpu(self, engine: Engine, subnetworks: Sequence[SubNetwork]) -> None:
        """Measure the memory that an image takes, and capture the graphs that the latencies of a profile are of.

        A step delays requests by about five batches of its size. The most expensive sub-networks come first, as at a
        start.
        """
        self._between(engine.warm_up)
        for batch_size in measured_batch_sizes(self._settings.max_batch_size):
            for subnetwork in reversed(subnetworks):
                self._between(partial(engine.prepare, subnetwork, batch_size))

    def _latencies(
        self, checkpoint: Checkpoint, engine: Engine, between: BetweenBatches, served: ServedModel
    ) -> ProfileWithFile | LatencyTable:
        """Take over the latencies of the served model where they must be the same; otherwise begin to measure."""
        folder, most, name = self._settings.profile_folder, self._settings.max_batch_size, engine.describe()
        padded = engine.pads_batches
        begin = partial(
            self._begin,
            checkpoint,
            name,
            between.run,
            folder=folder,
            max_batch_size=most,
            is_padded=padded,
            is_stopping=self._is_stopping,
            clock=between.clock,
        )
        is_same = checkpoint.config == served.checkpoint.config and name == served.engine.describe()
        if not is_same:
            return begin()
        if not isinstance(served.known, LatencyTable):
            return inherited_profile(
                checkpoint, name, served.known[0].figures, folder=folder, max_batch_size=most, is_padded=padded
            )
        if served.known.seconds.keys() >= extended_profile(checkpoint).by_subnetwork.keys():
            return served.known
        return begin()
