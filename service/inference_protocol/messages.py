"""The messages of the Open Inference Protocol, for any transport: requests with their tensors, and replies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from service.domain import Classification

Parameter = bool | int | float | str
Parameters = Mapping[str, Parameter]
Values = Sequence[object] | npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A tensor of a request.

    Attributes:
        name: name of the model's input.
        datatype: as the protocol writes it, such as "BYTES", "UINT8" or "FP32".
        shape: shape, not yet checked against the contents.
        contents: bytes in Triton's binary layout (little-endian, row by row; each element of BYTES after its length in
            four bytes), or values, flat or nested as in JSON. Among values of BYTES, a `str` is base64, and `bytes` are
            the element itself.
        parameters: parameters of the tensor.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    contents: bytes | memoryview | Values
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names, and its parameters: `classification`, `binary_data`."""

    name: str
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """An inference request.

    Attributes:
        model_name: name of the model that is asked.
        model_version: its version; "" for any.
        id: the client's ID for the request, which the reply repeats; "" for none.
        parameters: parameters of the request.
        inputs: input tensors.
        outputs: outputs that the request wants; empty for all.
    """

    model_name: str
    model_version: str
    id: str
    parameters: Parameters
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a reply.

    Attributes:
        name: name of the output.
        datatype: "FP32" or "BYTES".
        contents: array of the output's shape: float32, or strings as objects.
    """

    name: str
    datatype: str
    contents: npt.NDArray[np.float32] | npt.NDArray[np.object_]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, the images first."""
        return self.contents.shape

    @property
    def values(self) -> list[float] | list[str]:
        """The values of the tensor, row by row."""
        values: list[float] | list[str] = self.contents.ravel().tolist()
        return values


@dataclass(frozen=True, slots=True)
class InferReply:
    """The reply to an inference request.

    Attributes:
        model_name: name of the model that answered.
        model_version: version of that model.
        id: the client's ID for the request.
        parameters: what was decided for its images, and why.
        outputs: output tensors.
        answers: the pipeline's answer for each image, of which the outputs were made.
    """

    model_name: str
    model_version: str
    id: str
    parameters: Parameters
    outputs: tuple[OutputTensor, ...]
    answers: tuple[Classification, ...]
