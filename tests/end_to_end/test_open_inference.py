"""Unmodified clients of other inference servers against the real command over a real socket."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from models.checkpoint import load_checkpoint
from service.decoding.images import decode_image
from tests.end_to_end.test_serving import PHOTOGRAPH, ROOT, SMALL_CHECKPOINT, free_port, start, wait_until_ready

CLIENTS = ROOT / "tests" / "clients"
PYTHON = CLIENTS / ".venv" / "bin" / "python"
WITHOUT_ENVIRONMENT = (
    "kserve and ovmsclient cannot share our environment; `python3 -m venv tests/clients/.venv && "
    "tests/clients/.venv/bin/pip install -r tests/clients/requirements.txt` makes one for them"
)
# In CI, where the suite gates changes, it must not pass by skipping.
needs_clients = pytest.mark.skipif(not PYTHON.exists() and "CI" not in os.environ, reason=WITHOUT_ENVIRONMENT)
IMAGE = PHOTOGRAPH.read_bytes()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, profile_folder: Path) -> Iterator[str]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    process = start(port, log, "--checkpoint", SMALL_CHECKPOINT, "--profile-folder", str(profile_folder))
    wait_until_ready(process, f"http://127.0.0.1:{port}", log)
    yield f"127.0.0.1:{port}"
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


@pytest.fixture(scope="module")
def pixels() -> npt.NDArray[np.uint8]:
    """(2, 3, 32, 32): IMAGE as the server decodes it, and the same pixels upside down."""
    image = decode_image(IMAGE, load_checkpoint(SMALL_CHECKPOINT).config, 10_000_000).numpy()
    return np.stack([image, image[:, ::-1]])


def files(*images: bytes) -> triton.InferInput:
    values = np.array([[image] for image in images], np.object_)
    tensor = triton.InferInput("image", [len(images), 1], "BYTES")
    return tensor.set_data_from_numpy(values) or tensor


def of_pixels(values: npt.NDArray[np.uint8] | npt.NDArray[np.float32], *, binary: bool) -> triton.InferInput:
    tensor = triton.InferInput("image", list(values.shape), "UINT8" if values.dtype == np.uint8 else "FP32")
    return tensor.set_data_from_numpy(values, binary_data=binary) or tensor


def test_the_server_is_live_and_ready_and_lists_one_model(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(SMALL_CHECKPOINT)
    assert client.is_model_ready(SMALL_CHECKPOINT, "1")
    assert not client.is_model_ready("huge")
    assert [model["name"] for model in client.get_model_repository_index()] == [SMALL_CHECKPOINT]


def test_the_server_describes_its_extensions_and_the_tensors_of_its_model(client: triton.InferenceServerClient) -> None:
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata, config = client.get_model_metadata(SMALL_CHECKPOINT), client.get_model_config(SMALL_CHECKPOINT)
    assert metadata["outputs"][0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
    assert config["input"] == [{"name": "image", "data_type": "TYPE_STRING", "dims": [1]}]


def test_an_image_file_and_pixel_tensors_in_binary_or_json_get_the_same_answer(
    client: triton.InferenceServerClient, pixels: npt.NDArray[np.uint8]
) -> None:
    by_name = {"patch_grid": 8, "keep_rate": 1.0}
    expected = client.infer(SMALL_CHECKPOINT, [files(IMAGE)], parameters=by_name).as_numpy("probabilities")
    assert expected.shape == (1, 10)
    for values in (pixels[:1], (pixels[:1] / 255).astype(np.float32)):
        for binary in (True, False):
            wanted = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
            tensor = of_pixels(values, binary=binary)
            answer = client.infer(SMALL_CHECKPOINT, [tensor], outputs=wanted, parameters=by_name)
            assert answer.as_numpy("probabilities") == pytest.approx(expected, abs=1e-4)


def test_answers_to_several_images_are_in_the_order_of_the_images(
    client: triton.InferenceServerClient, pixels: npt.NDArray[np.uint8]
) -> None:
    parameters = {"top_k": 3, "patch_grid": 8, "keep_rate": 1.0}
    answer = client.infer(SMALL_CHECKPOINT, [of_pixels(pixels, binary=True)], request_id="7", parameters=parameters)
    assert answer.get_response()["id"] == "7"
    assert answer.as_numpy("labels").shape == (2, 3)
    for index in (0, 1):
        tensor = of_pixels(pixels[index : index + 1], binary=True)
        alone = client.infer(SMALL_CHECKPOINT, [tensor], parameters=parameters).as_numpy("probabilities")
        assert answer.as_numpy("probabilities")[index] == pytest.approx(alone[0], abs=1e-4)


def test_class_count_returns_classes_as_value_index_and_label(client: triton.InferenceServerClient) -> None:
    wanted = [triton.InferRequestedOutput("probabilities", class_count=3)]
    answer = client.infer(SMALL_CHECKPOINT, [files(IMAGE, IMAGE)], outputs=wanted).as_numpy("probabilities")
    assert answer.shape == (2, 3)
    value, index, label = answer[0, 0].decode().split(":")
    assert 0 < float(value) <= 1
    assert label == load_checkpoint(SMALL_CHECKPOINT).class_names[int(index)]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_read(client: triton.InferenceServerClient, algorithm: str) -> None:
    options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    assert client.infer(SMALL_CHECKPOINT, [files(IMAGE)], **options).as_numpy("labels").shape == (1, 5)


def test_a_timeout_is_the_latency_budget_and_a_priority_is_accepted(client: triton.InferenceServerClient) -> None:
    answer = client.infer(SMALL_CHECKPOINT, [files(IMAGE)], timeout=900_000, priority=3)
    assert answer.get_response()["parameters"]["deadline_met"] is True
    with pytest.raises(InferenceServerException, match="is too small"):
        client.infer(SMALL_CHECKPOINT, [files(IMAGE)], timeout=1)


def test_compute_budgets_in_parameters_and_headers_are_kept(client: triton.InferenceServerClient) -> None:
    for given in ({"parameters": {"budget_gflops": 0.02}}, {"headers": {"x-budget-gflops": "0.02"}}):
        answer = client.infer(SMALL_CHECKPOINT, [files(IMAGE)], **given)
        assert answer.get_response()["parameters"]["gflops"] <= 0.02


@pytest.mark.parametrize(
    ("model", "options", "status", "sentence"),
    [
        ("huge", {}, "404", "unknown model 'huge'"),
        (SMALL_CHECKPOINT, {"model_version": "2"}, "404", "unknown version '2'"),
        (SMALL_CHECKPOINT, {"parameters": {"budget": 1}}, "422", "budget: unknown parameter"),
        (SMALL_CHECKPOINT, {"sequence_id": 7}, "422", "sequences of requests are not supported"),
    ],
)
def test_errors_have_a_status_and_a_readable_message(
    client: triton.InferenceServerClient, model: str, options: dict[str, object], status: str, sentence: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [files(IMAGE)], **options)
    assert caught.value.status() == status
    assert sentence in caught.value.message()


def test_unsupported_endpoints_answer_404(client: triton.InferenceServerClient) -> None:
    for ask in (client.get_trace_settings, client.get_log_settings, client.get_system_shared_memory_status):
        with pytest.raises(InferenceServerException) as caught:
            ask()
        assert caught.value.status() == "404"


def test_the_statistics_grow_with_the_answers(client: triton.InferenceServerClient) -> None:
    [before] = client.get_inference_statistics()["model_stats"]
    client.infer(SMALL_CHECKPOINT, [files(IMAGE, IMAGE)])
    [after] = client.get_inference_statistics(SMALL_CHECKPOINT)["model_stats"]
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]


@pytest.mark.anyio
async def test_the_asyncio_client_gets_answers_and_errors(address: str, pixels: npt.NDArray[np.uint8]) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_model_ready(SMALL_CHECKPOINT)
        for tensor in (files(IMAGE), of_pixels(pixels, binary=True), of_pixels(pixels, binary=False)):
            answer = await client.infer(SMALL_CHECKPOINT, [tensor])
            assert answer.as_numpy("probabilities").sum(axis=1) == pytest.approx(1, abs=1e-3)
        with pytest.raises(InferenceServerException, match="unknown model"):
            await client.infer("huge", [files(IMAGE)])


@needs_clients
@pytest.mark.parametrize("script", ["kserve_rest.py", "ovmsclient_both.py"])
def test_unmodified_kserve_and_ovmsclient_rest_clients_are_answered(address: str, script: str) -> None:
    command = [str(PYTHON), str(CLIENTS / script), f"http://{address}", SMALL_CHECKPOINT, str(PHOTOGRAPH)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
