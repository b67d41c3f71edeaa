"""Runs Triton's unmodified gRPC clients against a server of ours.

python triton_grpc.py ADDRESS MODEL IMAGE
"""

import asyncio
import queue
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

UNHURRIED = {"budget_ms": 60_000}


def file_input(*images: bytes) -> InferInput:
    tensor = InferInput("image", [len(images), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[image] for image in images], np.object_))
    return tensor


def pixel_input(datatype: str, pixels: "np.typing.NDArray[np.generic]") -> InferInput:
    tensor = InferInput("image", list(pixels.shape), datatype)
    tensor.set_data_from_numpy(pixels)
    return tensor


def describe(client: tritonclient.grpc.InferenceServerClient, model: str) -> None:
    """Request the health, metadata, configuration and statistics of the server and its model."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert not client.is_model_ready("other")
    assert client.get_server_metadata(as_json=True)["name"] == "supervit-serve"
    metadata = client.get_model_metadata(model)
    assert [(tensor.name, tensor.datatype) for tensor in metadata.inputs] == [("image", "BYTES")]
    assert client.get_model_config(model).config.max_batch_size > 0
    (entry,) = client.get_model_repository_index().models
    assert (entry.name, entry.state) == (model, "READY")
    (statistics,) = client.get_inference_statistics(model).model_stats
    assert statistics.name == model


def infer(client: tritonclient.grpc.InferenceServerClient, model: str, image: bytes) -> None:
    """Send image files and pixels, plain and compressed, and receive answers directly and by callback."""
    answer = client.infer(model, [file_input(image)], request_id="7", parameters={"top_k": 3})
    probabilities = answer.as_numpy("probabilities")
    assert answer.get_response().id == "7"
    assert probabilities.shape == (1, 10)
    assert abs(float(probabilities.sum()) - 1) < 1e-3
    assert answer.as_numpy("labels").shape == (1, 3)

    outputs = [InferRequestedOutput("probabilities", class_count=2)]
    ((best, _),) = client.infer(model, [file_input(image)], outputs=outputs).as_numpy("probabilities")
    value, index, _ = best.decode().split(":")
    assert int(index) == probabilities[0].argmax()
    assert abs(float(value) - probabilities[0].max()) < 1e-3

    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    whole = client.infer(model, [pixel_input("UINT8", pixels)], parameters=UNHURRIED).as_numpy("probabilities")
    scaled = pixel_input("FP32", (pixels / 255).astype(np.float32))
    real = client.infer(model, [scaled], parameters=UNHURRIED).as_numpy("probabilities")
    assert whole.shape == (2, 10)
    assert np.allclose(whole, real, atol=1e-3)

    compressed = client.infer(model, [file_input(image)], compression_algorithm="gzip")
    assert np.allclose(compressed.as_numpy("probabilities"), probabilities, atol=1e-3)

    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.async_infer(model, [file_input(image)], lambda result, error: answers.put((result, error)))
    _, error = answers.get(timeout=20)
    assert error is None


def stream(client: tritonclient.grpc.InferenceServerClient, model: str, image: bytes) -> None:
    """Send requests over a stream, in which a failed request does not end the others."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number, data in enumerate((image, b"no image", image)):
        client.async_stream_infer(model, [file_input(data)], request_id=str(number))
    seen = [answers.get(timeout=20) for _ in range(3)]
    client.stop_stream()
    assert {result.get_response().id for result, error in seen if error is None} == {"0", "2"}
    (error,) = (error for _, error in seen if error is not None)
    assert "not an image" in error.message()


def fail(client: tritonclient.grpc.InferenceServerClient, model: str, image: bytes) -> None:
    """Send requests that must fail."""

    def status(**options: object) -> str:
        try:
            client.infer(**{"model_name": model, "inputs": [file_input(image)], **options})
        except InferenceServerException as error:
            return str(error.status())
        raise AssertionError(f"{options} is answered")

    assert status(model_name="other") == "StatusCode.NOT_FOUND"
    assert status(model_version="2") == "StatusCode.NOT_FOUND"
    assert status(inputs=[file_input(b"no image")]) == "StatusCode.INVALID_ARGUMENT"
    assert status(parameters={"budget_gflops": 1e-6}) == "StatusCode.INVALID_ARGUMENT"
    assert status(client_timeout=0.0001) == "StatusCode.DEADLINE_EXCEEDED"


async def infer_in_parallel(address: str, model: str, image: bytes) -> None:
    """Use the asyncio client for concurrent requests, a stream and a cancelled request."""
    async with tritonclient.grpc.aio.InferenceServerClient(address) as client:
        assert await client.is_server_ready()
        ask = partial(client.infer, model, parameters=UNHURRIED)
        answers = await asyncio.gather(*(ask([file_input(image)]) for _ in range(20)))
        assert {answer.as_numpy("probabilities").shape for answer in answers} == {(1, 10)}

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for number in range(3):
                yield {"model_name": model, "inputs": [file_input(image)], "request_id": str(number)}

        seen = [pair async for pair in client.stream_infer(requests())]
        assert {result.get_response().id for result, error in seen if error is None} == {"0", "1", "2"}

        call = asyncio.create_task(ask([file_input(image)]))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait((call,))
        assert call.cancelled()


def main(address: str, model: str, path: str) -> None:
    image = Path(path).read_bytes()
    with tritonclient.grpc.InferenceServerClient(address) as client:
        describe(client, model)
        infer(client, model, image)
        stream(client, model, image)
        fail(client, model, image)
    asyncio.run(infer_in_parallel(address, model, image))


main(*sys.argv[1:])
