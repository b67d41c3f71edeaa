"""Runs kserve's unmodified gRPC client against a server of ours.

python kserve_grpc.py ADDRESS MODEL IMAGE
"""

import asyncio
import sys
from pathlib import Path

import grpc
import numpy as np
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient


async def ask(address: str, model: str, image: bytes) -> None:
    """Send every kind of request that the client offers, and assert that each answer is as expected."""
    client = InferenceGRPCClient(address, timeout=20)
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready(model)
    assert not await client.is_model_ready("huge")

    listed = InferInput("image", [1], "BYTES", [image])
    raw = InferInput("image", [1], "BYTES")
    raw.set_data_from_numpy(np.array([image], np.object_), binary_data=True)
    answers = [
        await client.infer(InferRequest(model, [each], request_id="7", parameters={"budget_ms": 10_000}))
        for each in (listed, raw)
    ]
    for answer in answers:
        probabilities, labels = answer.outputs
        assert (answer.id, answer.model_name) == ("7", model)
        assert probabilities.as_numpy().shape == (1, 10)
        assert abs(float(probabilities.as_numpy().sum()) - 1) < 1e-3
        assert labels.shape == [1, 5]
    assert np.allclose(answers[0].outputs[0].as_numpy(), answers[1].outputs[0].as_numpy(), atol=1e-3)

    pixels = InferInput("image", [2, 3, 32, 32], "FP32")
    pixels.set_data_from_numpy(np.full((2, 3, 32, 32), 0.5, np.float32), binary_data=False)
    answer = await client.infer(InferRequest(model, [pixels]))
    assert answer.outputs[0].as_numpy().shape == (2, 10)

    failure = None
    try:
        await client.infer(InferRequest("huge", [listed]))
    except grpc.RpcError as error:
        failure = error
    assert failure is not None
    assert failure.code() is grpc.StatusCode.NOT_FOUND
    assert "unknown model 'huge'" in str(failure.details())
    await client.close()


asyncio.run(ask(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes()))
