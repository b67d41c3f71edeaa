"""Prepares a model beside the one that is served.

What computes is given to the engine's thread an image at a time, but for the first run, which takes too long for that.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint
from models.files.sources import find_checkpoint
from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.assembly import Profiled, ServedModel, assemble
from service.engines.base import Engine, Run
from service.engines.factory import engine_threads, open_engine
from service.engines.profile_store import begin_profile, extended_profile, inherited_profile
from service.errors import ModelChangeError, NotReadyError
from service.execution.comparison import require_numbers
from service.execution.engine_thread import EngineThread
from service.machine.monitor import Monitor
from service.scheduling.key_ledger import KeyLedger
from service.settings import Settings
from service.telemetry.metrics import Metrics

# Of the size of its file, for the weights in float32, graphs of them and what is left of compiling these: the default
# checkpoint, 44 MB in half precision, took 445 MB with one in 8 bits and one in bfloat16, the small one, 2.8 MB, 72.
MEMORY_OF_FILE = 10
MEMORY_BYTES = 100_000_000  # on top of it
REHEARSED_S = 0.02  # by the profile, that a batch takes at most which requests may have to wait for

Load = Callable[[Path], Checkpoint]
OpenEngine = Callable[..., tuple[Engine, Checkpoint]]


class CandidateMaker:
    """Makes models ready to be served; its methods wait, and are for a thread of their own.

    It does not give way to others: the threads that an engine starts would do so for good, and one that holds Python's
    lock while others have the cores would keep the event loop waiting.
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
        open_engine: OpenEngine = open_engine,
        begin: Callable[..., Profiled] = begin_profile,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take what they share with the one that is served.

        Args:
            settings: every knob.
            thread: on which engines compute.
            metrics: what is counted.
            monitor: looks at the machine.
            ledger: of what the holders of keys have had.
            load: reads a checkpoint.
            open_engine: makes an engine for it.
            begin: reads the latencies that were measured before, and measures what is needed to begin.
            is_stopping: whether the server stops, so that another process that measures is waited for no longer.
        """
        self._settings, self._thread, self._metrics, self._monitor = settings, thread, metrics, monitor
        self._ledger, self._load, self._open_engine = ledger, load, open_engine
        self._begin, self._is_stopping = begin, is_stopping

    def load(self, name: str) -> Checkpoint:
        """Load a checkpoint.

        Raises:
            CheckpointError: there is none of that name, or it is broken.
            ModelChangeError: the memory that is free holds no second model of its size.
        """
        path = find_checkpoint(name)
        needed, free = MEMORY_OF_FILE * path.stat().st_size + MEMORY_BYTES, self._monitor.latest.memory_available_bytes
        if free is not None and needed > free:
            message = f"a second model of this size may take {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
            raise ModelChangeError(message)
        return self._load(path)

    def prepare(self, checkpoint: Checkpoint, beside: ServedModel) -> ServedModel:
        """Compile a model, run each sub-network once, and find out or measure how long it takes.

        Raises:
            DeviceError: no engine can run it here.
            ModelChangeError: what it answers is no number.
            NotReadyError: the server stops.
        """
        settings = self._settings
        threads = settings.threads or engine_threads(checkpoint, self._monitor.latest.cores)
        kind, device, precision = settings.engine, settings.device, settings.precision
        engine, checkpoint = self._open_engine(checkpoint, kind, device, precision, threads)
        run, config = self.run_of(engine), checkpoint.config
        # The first run of all takes five to ten times as long as any other: on the engine's thread, requests would wait
        # for it. The cheapest may be in floating point where the dearest is in 8 bits. A GPU is for that thread alone.
        ends = () if engine.is_on_gpu else (config.subnetworks[0], config.largest)
        require_numbers(engine.run, config.image_side, ends)
        require_numbers(run, config.image_side, tuple(each for each in config.subnetworks if each not in ends))
        if engine.is_on_gpu:  # where it takes a moment, and also tells how much memory an image takes
            self._thread.work(engine.warm_up).result()
        return assemble(
            settings,
            checkpoint,
            engine,
            self._thread,
            metrics=self._metrics,
            monitor=self._monitor,
            threads=threads,
            ledger=self._ledger,
            known=self._latencies(checkpoint, engine, run, beside),
        )

    def rehearse(self, model: ServedModel, beside: ServedModel) -> None:
        """Run each shape of batch that the model that is served runs these days, where that takes but a moment.

        A library prepares itself for the first of a shape, for milliseconds: next to nothing where a batch takes long,
        and where it takes but a few it doubles the time of all the batches that follow the change.

        Raises:
            NotReadyError: the server stops.
        """
        if model.engine.pads_batches:  # it knows its shapes from the start
            return
        run, side = self.run_of(model.engine), model.checkpoint.config.image_side
        alone = [variant for variant in model.server.scheduler.catalog.variants if variant.second_look is None]
        seconds = {variant.profile.subnetwork: variant.latency_by_batch_s for variant in alone}
        for subnetwork, size in beside.sample.shapes():
            by_batch_s = seconds.get(subnetwork, ())
            if size <= len(by_batch_s) and by_batch_s[size - 1] <= REHEARSED_S:
                run(torch.zeros(size, 3, side, side, dtype=torch.uint8), subnetwork)

    def run_of(self, engine: Engine) -> Run:
        """Return what runs a batch of an engine between those of requests, and waits for it."""

        def run(images: Tensor, subnetwork: SubNetwork) -> Tensor:
            if self._is_stopping():
                raise NotReadyError("the server is stopping")
            return self._thread.work(partial(engine.run, images, subnetwork)).result()

        return run

    def _latencies(
        self, checkpoint: Checkpoint, engine: Engine, run: Run, beside: ServedModel
    ) -> Profiled | LatencyTable:
        """Take over those of the model that is served where they must be the same, or else begin to measure."""
        folder, most, name = self._settings.profile_folder, self._settings.max_batch_size, engine.describe()
        padded = engine.pads_batches
        begin = partial(
            self._begin,
            checkpoint,
            name,
            run,
            folder=folder,
            max_batch_size=most,
            is_padded=padded,
            is_stopping=self._is_stopping,
        )
        is_same = checkpoint.config == beside.checkpoint.config and name == beside.engine.describe()
        if not is_same:
            return begin()
        if not isinstance(beside.known, LatencyTable):
            return inherited_profile(
                checkpoint, name, beside.known[0].figures, folder=folder, max_batch_size=most, is_padded=padded
            )
        if beside.known.seconds.keys() >= extended_profile(checkpoint).by_subnetwork.keys():
            return beside.known
        return begin()
