"""Runs the unmodified ovmsclient against a server of ours: TensorFlow Serving's REST API at a URL, else gRPC.

python ovmsclient_both.py URL_OR_ADDRESS MODEL IMAGE
"""

import sys
from pathlib import Path

import numpy as np
from ovmsclient import make_grpc_client, make_http_client


def ask(address: str, model: str, image: bytes) -> None:
    """Send every kind of request that the client offers, and assert that each answer is as expected."""
    host = address.removeprefix("http://")
    client = make_grpc_client(host) if host == address else make_http_client(host)
    assert client.get_model_status(model) == {1: {"state": "AVAILABLE", "error_code": 0, "error_message": ""}}
    metadata = client.get_model_metadata(model)
    assert metadata["inputs"] == {"image": {"dtype": "DT_STRING", "shape": [-1, 1]}}
    assert metadata["outputs"]["probabilities"] == {"dtype": "DT_FLOAT", "shape": [-1, 10]}
    for value, number in ((image, 1), ([image, image], 2), (np.full((2, 3, 32, 32), 0.5, np.float32), 2)):
        outputs = client.predict({"image": value}, model)
        assert outputs["probabilities"].shape == (number, 10)
        assert np.abs(outputs["probabilities"].sum(axis=1) - 1).max() < 1e-3
        assert outputs["labels"].shape == (number, 5)
    message = ""
    try:
        client.predict({"image": image}, "huge")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    assert message.startswith("ModelNotFoundError")
    assert "unknown model 'huge'" in message


ask(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes())
