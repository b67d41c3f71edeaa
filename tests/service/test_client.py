import io
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from service.app import create_app
from service.client import AsyncClient, Client
from service.engines.profile_store import extended_profile
from service.engines.torch_engine import TorchEngine
from service.errors import BudgetTooSmallError, InvalidParameterError, OverloadedError, UnexpectedAnswerError
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.wire_answers import ANSWER, refusal


@pytest.fixture
async def in_process(checkpoint: Checkpoint, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    """A client of the whole service, which runs in this process."""
    latencies = LatencyTable((1, 4), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (1e-06, 2e-06)))
    engine = TorchEngine(checkpoint.model, "cpu", threads=1)
    app = create_app(ServerRuntime(Settings(checkpoint=str(tmp_path)), checkpoint, engine, latencies))
    async with (
        app.router.lifespan_context(app),
        AsyncClient("http://in-process", transport=httpx.ASGITransport(app)) as client,
    ):
        await client.wait_until_ready()
        yield client


@pytest.mark.anyio
async def test_classify_sends_its_options_and_parses_the_answer(in_process: AsyncClient, photo: bytes) -> None:
    answer = await in_process.classify(photo, budget_ms=5000, top_k=2, patch_grid=2, keep_rate=0.5)
    assert [entry.label[:6] for entry in answer.predictions] == ["thing "] * 2
    assert (answer.subnetwork.patch_grid, answer.subnetwork.keep_rate) == (2, 0.5)
    assert answer.budget_ms == 5000
    assert answer.model.name == "tiny"


@pytest.mark.anyio
async def test_feedback_finds_the_answer_by_the_request_id_given_to_classify(
    in_process: AsyncClient, photo: bytes
) -> None:
    answer = await in_process.classify(photo, budget_ms=5000, request_id="door-17")
    found = await in_process.feedback("door-17", label=answer.predictions[0].label)
    assert (found.correct, found.counted) == (True, True)
    again = await in_process.feedback("door-17", index=answer.predictions[1].index)
    assert (again.correct, again.counted) == (False, False)


@pytest.mark.anyio
async def test_a_decision_needs_no_image(in_process: AsyncClient) -> None:
    forecast = await in_process.decide(patch_grid=2, keep_rate=0.5, budget_ms=5000)
    assert (forecast.subnetwork.patch_grid, forecast.subnetwork.keep_rate) == (2, 0.5)


def test_the_blocking_client_decides_and_gives_feedback() -> None:
    asked = list[tuple[str, str, bytes]]()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, str(request.url.query, "ascii"), request.content))
        return httpx.Response(404, json={})

    with Client("http://server", transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(UnexpectedAnswerError):
            client.decide(budget_gflops=2.3)
        with pytest.raises(UnexpectedAnswerError):
            client.feedback("door-17", index=3)
    report = b'{"request_id": "door-17", "index": 3, "image": 0}'
    assert asked == [("/decide", "budget_gflops=2.3", b""), ("/feedback", "", report)]


@pytest.mark.anyio
async def test_the_async_client_gets_an_explanation(in_process: AsyncClient, photo: bytes) -> None:
    answer = await in_process.explain(photo, patch_grid=4, keep_rate=0.5)
    assert [pruning.block for pruning in answer.explanation.prunings] == [1]
    assert answer.subnetwork.patch_grid == 4


def test_the_blocking_client_gets_an_explanation() -> None:
    explanation = {"seen_share": 0.875, "prunings": []}
    asked = list[str]()

    def explain(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(200, json=ANSWER | {"explanation": explanation})

    with Client("http://server", transport=httpx.MockTransport(explain)) as client:
        assert client.explain(b"photo").explanation.seen_share == 0.875
    assert asked == ["/explain"]


@pytest.mark.anyio
async def test_an_error_answer_raises_the_same_error_as_in_the_server(in_process: AsyncClient, photo: bytes) -> None:
    cheapest = min(row.gflops for row in (await in_process.subnetworks()).subnetworks)
    with pytest.raises(BudgetTooSmallError, match="GFLOPs") as caught:
        await in_process.classify(photo, budget_gflops=cheapest / 2)
    assert caught.value.details


@pytest.mark.anyio
async def test_the_async_client_retries() -> None:
    script = iter([refusal(429, "overloaded", reason="full", retry_after_s=3), httpx.Response(200, json=ANSWER)])
    slept_s = []

    async def sleep(seconds: float) -> None:
        slept_s.append(seconds)

    transport = httpx.MockTransport(lambda _: next(script))
    async with AsyncClient("http://server", transport=transport, sleep=sleep, draw=lambda: 0.0) as client:
        assert (await client.classify(b"image")).gflops == 2.193
    assert slept_s == [3]


def test_an_image_may_be_bytes_a_path_or_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"image")
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return httpx.Response(200, json=ANSWER)

    with Client("http://server", transport=httpx.MockTransport(answer)) as client:
        for image in (b"image", path, str(path), io.BytesIO(b"image")):
            client.classify(image)
        with pytest.raises(FileNotFoundError):
            client.classify(tmp_path / "none.jpg")
        with pytest.raises(TypeError, match=r"^an image is a path, bytes or a binary file, not list$"):
            client.classify([1, 2, 3])  # type: ignore[arg-type] # what is tested
    assert bodies == [b"image"] * 4


def test_only_the_given_options_are_in_the_query() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://server/behind/classify?budget_gflops=2.3&priority=-1"
        return httpx.Response(200, json=ANSWER)

    with Client("http://server/behind", transport=httpx.MockTransport(answer)) as client:
        client.classify(b"image", budget_gflops=2.3, priority=-1, budget_ms=None)


@pytest.mark.anyio
async def test_the_api_key_is_sent_with_every_request() -> None:
    sent = list[str | None]()

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("Authorization"))
        return httpx.Response(200, json=ANSWER)

    transport = httpx.MockTransport(answer)
    with Client("http://server", api_key="mine", transport=transport) as client:
        client.classify(b"image")
    async with AsyncClient("http://server", api_key="mine", transport=transport) as asynchronous:
        await asynchronous.classify(b"image")
    with Client("http://server", transport=transport) as client:
        client.classify(b"image")
    assert sent == ["Bearer mine", "Bearer mine", None]


def test_a_client_without_retries_raises_at_once() -> None:
    transport = httpx.MockTransport(lambda _: refusal(429, "overloaded", reason="full", retry_after_s=0))
    with Client("http://server", transport=transport, max_retries=0) as client, pytest.raises(OverloadedError):
        client.classify(b"image")


@pytest.mark.parametrize("url", ["nonsense", "http://[::1", "localhost:8000", "ftp://server", "http://"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_invalid_server_url_is_rejected_at_once(url: str, kind: type[Client | AsyncClient]) -> None:
    with pytest.raises(InvalidParameterError, match="is not a URL"):
        kind(url)


def test_importing_the_client_imports_no_library_of_the_server() -> None:
    heavy = ("torch", "fastapi", "starlette", "PIL", "openvino", "timm", "prometheus_client", "psutil")
    found = f"import sys, service.client; print(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
