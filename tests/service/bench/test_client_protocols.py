import json
import struct
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from service.bench.client_protocols import LENGTH_HEADER, Reply, Request, SupervitProtocol, V2Protocol
from service.errors import CommandError
from service.simulation.arrivals import Arrival
from tests.service.wire_answers import ANSWER, refusal

ARRIVAL = Arrival(0.0, 0.3, budget_gflops=2.3, priority=-2)


def metadata(datatype: str = "BYTES", shape: tuple[int, ...] = (-1, 1), inputs: int = 1) -> bytes:
    taken = [{"name": f"in{number}", "datatype": datatype, "shape": shape} for number in range(inputs)]
    given = [{"name": "scores", "datatype": "FP32", "shape": [-1, 3]}]
    return json.dumps({"name": "m", "inputs": taken, "outputs": given}).encode()


def inferred(datatype: str, data: list[Any], **parameters: object) -> bytes:
    output = {"name": "scores", "datatype": datatype, "shape": [1, len(data)], "data": data}
    return json.dumps({"model_name": "m", "outputs": [output], "parameters": parameters}).encode()


def parts(request: Request) -> tuple[dict[str, Any], bytes]:
    """Split a request into its JSON header and its binary tensor."""
    assert request.body is not None
    length = int(request.headers[LENGTH_HEADER])
    return json.loads(request.body[:length]), request.body[length:]


def test_budgets_and_priority_are_sent_in_the_query() -> None:
    request = SupervitProtocol().request(b"image", ARRIVAL)
    assert urlsplit(request.path).path == "/classify"
    asked = parse_qs(urlsplit(request.path).query)
    assert asked == {"top_k": ["1"], "budget_ms": ["300.0"], "budget_gflops": ["2.3"], "priority": ["-2"]}
    assert request.body == b"image"
    assert "budget_gflops" not in SupervitProtocol().request(b"image", Arrival(0.0, 0.3)).path


def test_a_reply_has_the_label_the_sub_network_and_the_cost_of_the_answer() -> None:
    reply = SupervitProtocol().read(200, json.dumps(ANSWER).encode())
    assert reply == Reply("ok", "dalmatian", "12-0.7", 2.193)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (429, refusal(429, "overloaded").content, "overloaded"),
        (502, b"<html>", "http_502"),
        (200, b"<html>", "unexpected_answer"),
        (200, b"{}", "unexpected_answer"),
    ],
)
def test_an_error_or_unexpected_answer_becomes_a_reply_with_its_code(status: int, body: bytes, code: str) -> None:
    assert SupervitProtocol().read(status, body) == Reply(code)


@pytest.mark.parametrize(("shape", "sent"), [((-1,), [1]), ((-1, 1), [1, 1])])
def test_a_model_that_takes_files_gets_the_file_as_a_binary_tensor(shape: tuple[int, ...], sent: list[int]) -> None:
    wire = V2Protocol("a/b", metadata(shape=shape), ())
    request = wire.request(wire.encode(b"image"), ARRIVAL)
    assert request.path == "/v2/models/a%2Fb/infer"
    said, binary = parts(request)
    assert binary == struct.pack("<I", 5) + b"image"
    assert said == {
        "parameters": {"budget_ms": 300.0, "budget_gflops": 2.3, "priority": -2},
        "inputs": [{"name": "in0", "datatype": "BYTES", "shape": sent, "parameters": {"binary_data_size": 9}}],
        "outputs": [{"name": "scores", "parameters": {"classification": 1, "binary_data": False}}],
    }


@pytest.mark.parametrize(
    ("datatype", "shape", "sent"),
    [
        ("UINT8", (-1, 3, 32, 32), [1, 3, 32, 32]),
        ("FP32", (-1, 3, 32, 32), [1, 3, 32, 32]),
        ("FP32", (3, -1, -1), [3, 224, 224]),
    ],
)
def test_a_model_that_takes_pixels_gets_pixels_of_its_input_size(
    photo: bytes, datatype: str, shape: tuple[int, ...], sent: list[int]
) -> None:
    wire = V2Protocol("m", metadata(datatype, shape), ())
    said, binary = parts(wire.request(wire.encode(photo), ARRIVAL))
    assert said["inputs"][0]["shape"] == sent
    pixels = np.frombuffer(binary, np.uint8 if datatype == "UINT8" else "<f4")
    assert pixels.size == 3 * sent[-1] ** 2
    assert pixels.max() <= (255 if datatype == "UINT8" else 2.65)  # the value of white, normalised
    assert pixels.std() > 0.5


def test_pixels_of_fp32_are_normalised(encode: Any) -> None:  # noqa: ANN401 - the fixture's
    wire = V2Protocol("m", metadata("FP32", (-1, 3, 8, 8)), ())
    red, green, blue = np.frombuffer(wire.encode(encode(Image.new("RGB", (9, 9), "white"))), "<f4").reshape(3, -1)
    assert (red[0], green[0], blue[0]) == pytest.approx((2.2489, 2.4286, 2.64), abs=1e-3)


@pytest.mark.parametrize(
    "described",
    [
        b"",
        b"{}",
        metadata("INT64", (-1, 8)),
        metadata("FP32", (-1, 224, 224, 3)),
        metadata("FP32", (-1, 8)),
        metadata(inputs=2),
    ],
)
def test_a_model_that_takes_no_image_is_rejected(described: bytes) -> None:
    with pytest.raises(CommandError, match=r"^m: "):
        V2Protocol("m", described, ())


@pytest.mark.parametrize(
    ("body", "label"),
    [
        (inferred("BYTES", ["0.99:27:dalma:tian"]), "dalma:tian"),
        (inferred("BYTES", [["0.99:1"]]), "b"),
        (inferred("FP32", [0.1, 0.2, 0.7]), "c"),
        (inferred("FP32", [[0.1, 0.9, 0.0]]), "b"),
        (inferred("FP32", [0.1, 0.2, 0.3, 0.4]), "3"),
    ],
)
def test_the_label_is_read_from_a_classification_or_from_scores_per_class(body: bytes, label: str) -> None:
    assert V2Protocol("m", metadata(), ("a", "b", "c")).read(200, body) == Reply("ok", label)


def test_a_v2_reply_has_the_sub_network_and_the_cost_if_the_server_reports_them() -> None:
    body = inferred("BYTES", ["0.9:0:cat"], patch_grid=12, keep_rate=0.7, gflops=2.2)
    assert V2Protocol("m", metadata(), ()).read(200, body) == Reply("ok", "cat", "12-0.7", 2.2)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, b'{"error": "no"}', "http_400"),
        (200, b'{"outputs": []}', "unexpected_answer"),
        (200, inferred("FP32", []), "unexpected_answer"),
        (200, inferred("FP32", ["x"]), "unexpected_answer"),
        (200, inferred("BYTES", ["cat"]), "unexpected_answer"),
        (200, inferred("BYTES", ["0.9:0:cat"], gflops="x"), "unexpected_answer"),
    ],
)
def test_an_error_or_unexpected_answer_in_v2_becomes_a_reply_with_its_code(status: int, body: bytes, code: str) -> None:
    assert V2Protocol("m", metadata(), ()).read(status, body) == Reply(code)
