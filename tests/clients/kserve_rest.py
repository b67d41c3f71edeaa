"""Runs kserve's unmodified REST client against a server of ours.

python kserve_rest.py URL MODEL IMAGE
"""

import asyncio
import base64
import sys
from pathlib import Path

import numpy as np
from httpx import HTTPStatusError
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceRESTClient, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


async def ask(url: str, model: str, image: bytes) -> None:
    """Send every kind of request that the client offers, and assert that each answer is as expected."""
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=20))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, model)

    binary = InferInput("image", [1], "BYTES")
    binary.set_data_from_numpy(np.array([image], np.object_))
    wanted = [RequestedOutput("probabilities", {"binary_data": True}), RequestedOutput("labels")]
    answer = await client.infer(url, InferRequest(model, [binary], request_id="7", request_outputs=wanted), model)
    probabilities, labels = answer.outputs
    assert answer.id == "7"
    assert answer.model_name == model
    assert probabilities.as_numpy().shape == (1, 10)
    assert abs(float(probabilities.as_numpy().sum()) - 1) < 1e-3
    assert labels.shape == [1, 5]

    pixels = InferInput("image", [2, 3, 32, 32], "FP32")
    pixels.set_data_from_numpy(np.full((2, 3, 32, 32), 0.5, np.float32), binary_data=False)
    answer = await client.infer(url, InferRequest(model, [pixels], parameters={"budget_ms": 900}), model)
    assert answer.outputs[0].as_numpy().shape == (2, 10)
    assert answer.parameters["deadline_met"] == "[true, true]"

    refused = None
    try:
        await client.infer(url, InferRequest("huge", [binary]), "huge")
    except HTTPStatusError as error:
        refused = error
    assert refused is not None
    assert refused.response.status_code == 404
    assert "unknown model 'huge'" in str(refused)

    rows = {"instances": [base64.b64encode(image).decode()] * 2}
    v1 = InferenceRESTClient(RESTConfig(protocol="v1", timeout=20))
    assert await v1.is_model_ready(url, model)
    predictions = (await v1.infer(url, rows, model))["predictions"]
    assert [len(prediction["probabilities"]) for prediction in predictions] == [10, 10]


asyncio.run(ask(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes()))
