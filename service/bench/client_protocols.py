"""Builds requests and parses answers, for this server's HTTP API or for the Open Inference Protocol (v2).

Sends nothing. In v2, Triton's extensions are used where servers know them: binary tensors, so that an image is sent as
it is, and `classification`, so that the answer is a label rather than a number for each class.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from service.errors import CommandError, UnexpectedAnswerError
from service.http.schemas import ClassifyAnswer, ErrorBody
from service.simulation.arrivals import Arrival

OK = "ok"
CHANNELS = 3
DEFAULT_SIDE_PX = 224  # for a model that takes any side
LENGTH_HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a path of the server, its query included; a POST with a body, a GET without."""

    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a request.

    Attributes:
        code: "ok", or why there is no answer.
        label: label of the most probable class.
        subnetwork: the sub-network that answered, if the server names it.
        gflops: cost of the answer in 1e9 MACs, if the server reports it.
    """

    code: str
    label: str | None = None
    subnetwork: str | None = None
    gflops: float | None = None

    @property
    def is_answer(self) -> bool:
        """Whether the image was classified."""
        return self.code == OK


class ClientProtocol(Protocol):
    """A protocol in which a server is asked."""

    def encode(self, image: bytes) -> bytes:
        """Encode an image file for sending; called once for each file, before anything is timed."""

    def request(self, encoded: bytes, arrival: Arrival) -> Request:
        """Build the request to classify an encoded image within the budgets of its arrival."""

    def read(self, status: int, body: bytes) -> Reply:
        """Parse the answer of the server."""


class SupervitProtocol:
    """POST /classify."""

    def encode(self, image: bytes) -> bytes:
        """Return the image file as it is."""
        return image

    def request(self, encoded: bytes, arrival: Arrival) -> Request:
        """Put the budgets into the query."""
        return Request(f"/classify?{urlencode({'top_k': 1} | _parameters(arrival))}", encoded)

    def read(self, status: int, body: bytes) -> Reply:
        """Parse an answer or the code of an error."""
        try:
            if status != HTTPStatus.OK:
                return Reply(ErrorBody.model_validate_json(body).error.code)
            answer = ClassifyAnswer.model_validate_json(body)
        except ValidationError:
            return Reply(UnexpectedAnswerError.code if status == HTTPStatus.OK else f"http_{status}")
        chosen = answer.subnetwork
        name = _subnetwork(chosen.patch_grid, chosen.keep_rate)
        return Reply(OK, answer.predictions[0].label if answer.predictions else None, name, answer.gflops)


class _Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(min_length=1)
    data: list[Any] = []


class _Metadata(BaseModel):
    inputs: list[_Tensor] = Field(min_length=1)
    outputs: list[_Tensor] = Field(min_length=1)


class _Inferred(BaseModel):
    outputs: list[_Tensor] = Field(min_length=1)
    parameters: dict[str, Any] = {}


class V2Protocol:
    """POST /v2/models/MODEL/infer, for models that take an image file or pixels and give a number for each class."""

    @staticmethod
    def path(model: str) -> str:
        """Return the path of a model's metadata."""
        return f"/v2/models/{quote(model, safe='')}"

    def __init__(self, model: str, metadata: bytes, class_names: Sequence[str]) -> None:
        """Read from its metadata what the model takes.

        Args:
            model: name of the model.
            metadata: the answer of GET /v2/models/MODEL.
            class_names: in the order of the model's outputs; needed only if the server returns no labels.

        Raises:
            CommandError: the metadata is invalid, or the model takes no images.
        """
        try:
            described = _Metadata.model_validate_json(metadata)
        except ValidationError as error:
            raise CommandError(f"{model}: the server's metadata does not follow the protocol") from error
        self._path = f"{self.path(model)}/infer"
        self._input, self._output, self._class_names = described.inputs[0], described.outputs[0], class_names
        if len(described.inputs) > 1 or not (self._takes_files or self._takes_pixels):
            taken = ", ".join(f"{tensor.name}, {tensor.datatype} of {tensor.shape}" for tensor in described.inputs)
            raise CommandError(f"{model}: must have one input of files (BYTES) or (3, S, S) pixels, not {taken}")

    @property
    def _takes_files(self) -> bool:
        return self._input.datatype == "BYTES"

    @property
    def _takes_pixels(self) -> bool:
        shape = self._input.shape
        return self._input.datatype in ("FP32", "UINT8") and len(shape) in (3, 4) and shape[-3] in (CHANNELS, -1)

    @property
    def _side_px(self) -> int:
        return self._input.shape[-1] if self._input.shape[-1] > 0 else DEFAULT_SIDE_PX

    def encode(self, image: bytes) -> bytes:
        """Return the file with its length before it, or its pixels."""
        if self._takes_files:
            return struct.pack("<I", len(image)) + image
        from service.bench.pixels import to_pixels  # importing PyTorch takes seconds, and most models take files

        return to_pixels(image, self._side_px, self._input.datatype)

    def request(self, encoded: bytes, arrival: Arrival) -> Request:
        """Put the tensor behind a JSON header, with the budgets among its parameters."""
        image = [] if self._takes_files else [CHANNELS, self._side_px, self._side_px]
        tensor = {
            "name": self._input.name,
            "datatype": self._input.datatype,
            "shape": [1] * (len(self._input.shape) - len(image)) + image,
            "parameters": {"binary_data_size": len(encoded)},
        }
        output = {"name": self._output.name, "parameters": {"classification": 1, "binary_data": False}}
        said = {"parameters": _parameters(arrival), "inputs": [tensor], "outputs": [output]}
        head = json.dumps(said).encode()
        return Request(self._path, head + encoded, {LENGTH_HEADER: str(len(head))})

    def read(self, status: int, body: bytes) -> Reply:
        """Parse the first output: Triton's "value:index:label", or a number for each class."""
        if status != HTTPStatus.OK:
            return Reply(f"http_{status}")
        try:
            inferred = _Inferred.model_validate_json(body)
            label = self._label(inferred.outputs[0])
            said = inferred.parameters
            gflops = float(said["gflops"]) if "gflops" in said else None
            name = _subnetwork(said["patch_grid"], said["keep_rate"]) if "patch_grid" in said else None
        except (ValidationError, ValueError, TypeError, LookupError):
            return Reply(UnexpectedAnswerError.code)
        return Reply(OK, label, name, gflops)

    def _label(self, output: _Tensor) -> str:
        if output.datatype != "BYTES":
            return self._name(int(np.argmax(np.asarray(output.data, np.float64))))
        text = np.asarray(output.data, np.object_).ravel()[0]
        _, index, *label = str(text).split(":", 2)
        return label[0] if label else self._name(int(index))

    def _name(self, index: int) -> str:
        return self._class_names[index] if 0 <= index < len(self._class_names) else str(index)


def _parameters(arrival: Arrival) -> dict[str, float]:
    said: dict[str, float] = {"budget_ms": round(1000 * arrival.budget_s, 3)}
    if arrival.budget_gflops is not None:
        said["budget_gflops"] = arrival.budget_gflops
    if arrival.priority:
        said["priority"] = arrival.priority
    return said


def _subnetwork(patch_grid: int, keep_rate: float) -> str:
    return f"{patch_grid}-{keep_rate:g}"
