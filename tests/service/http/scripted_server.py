"""A server whose engine a test can block or make fail, and checks of its answers and metrics."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi.testclient import TestClient
from torch import Tensor

from models.checkpoint import Checkpoint
from models.subnetwork import SubNetwork
from service.app import create_app
from service.engines.torch_engine import TorchEngine
from service.runtime import ServerRuntime

BODY_LIMIT = 30_000


class ScriptedEngine(TorchEngine):
    """The real engine, which a test can block or make fail."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.model, "cpu", threads=1, precision="float32")  # as when tests run the model
        self.may_warm_up = threading.Event()
        self.may_warm_up.set()
        self.may_run = threading.Event()
        self.may_run.set()
        self.running = threading.Event()
        self.error: Exception | None = None
        self.warm_up_error: Exception | None = None
        self.logits: Tensor | None = None
        self.sizes: list[int] = []
        self.fitting: int | None = None

    def fitting_images(self) -> int | None:
        return self.fitting

    def warm_up(self) -> None:
        assert self.may_warm_up.wait(60)
        if self.warm_up_error:
            raise self.warm_up_error
        if not self.is_on_gpu:  # a test may claim a GPU that does not exist
            super().warm_up()

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.running.set()
        self.sizes.append(len(images))
        assert self.may_run.wait(60)
        if self.error:
            raise self.error
        return super().run(images, subnetwork) if self.logits is None else self.logits


@contextmanager
def serving(runtime: ServerRuntime) -> Iterator[TestClient]:
    """Serve a runtime that can answer the first request."""
    with TestClient(create_app(runtime, ready_first=True), raise_server_exceptions=False) as client:
        yield client


def error_code(response: object, status: int) -> str:
    assert response.status_code == status, response.text  # type: ignore[attr-defined] # from httpx or its successor
    error = response.json()["error"]  # type: ignore[attr-defined] # as above
    assert set(error) == {"code", "message", "details"}
    assert error["message"]
    return str(error["code"])


def sample(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(scheduler.rsplit(" ", 1)[1]) for scheduler in lines if scheduler.startswith(name))
