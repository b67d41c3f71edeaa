"""The composition root: wires every room once around one checkpoint."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI

from models.checkpoint import Checkpoint
from models.data import evaluation_transform
from service.api import Api, add_error_handlers, build_router
from service.batcher import Batcher
from service.engine import Engine, TorchEngine
from service.images import decode_image
from service.metrics import Metrics, process_registry
from service.pipeline import Pipeline
from service.settings import Settings

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    checkpoint: Checkpoint,
    engine: Engine | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Wire the service.

    Args:
        settings: every knob.
        checkpoint: what to serve.
        engine: runs the batches; PyTorch on the settings' device by default.
        on_failure: called once the model cannot run at all, as after a failed warm-up; the server should then end.

    Raises:
        DeviceError: the device cannot be used.
    """
    engine = engine or TorchEngine(checkpoint.model, settings.device)
    metrics = Metrics(process_registry())
    metrics.describe(list(checkpoint.profile.by_subnetwork), checkpoint.name, checkpoint.version)
    batcher = Batcher(engine.run, settings.max_batch_size, metrics.batch_ran)
    decode_threads = ThreadPoolExecutor(settings.decode_threads, "decode")
    transform = evaluation_transform(checkpoint.config)
    pipeline = Pipeline(
        profiles=checkpoint.profile,
        class_names=checkpoint.class_names,
        decode=partial(decode_image, transform=transform, max_pixels=settings.max_image_pixels),
        decode_threads=decode_threads,
        batcher=batcher,
        metrics=metrics,
        max_waiting=settings.max_waiting,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving = asyncio.create_task(batcher.serve())
        warming_up = asyncio.create_task(pipeline.warm_up(engine.warm_up))
        for task in (serving, warming_up):
            task.add_done_callback(on_end)
        logger.info("serving %s %s with %s", checkpoint.name, checkpoint.version, engine.describe())
        yield
        await asyncio.wait((warming_up,))
        batcher.stop()
        await asyncio.wait((serving,))
        decode_threads.shutdown()

    def on_end(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            logger.critical("the model cannot run: %s", error, exc_info=error)
            pipeline.is_ready = False
            on_failure()

    app = FastAPI(title="SuperViT Serve", version=version("supervit-serve"), lifespan=lifespan, redoc_url=None)
    api = Api(checkpoint, pipeline, metrics, settings.max_body_bytes, settings.max_upload_s)
    app.include_router(build_router(api))
    add_error_handlers(app, api)
    return app
