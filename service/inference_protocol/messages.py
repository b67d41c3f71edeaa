"""What the Open Inference Protocol says, whatever carries it: requests with their tensors, and replies."""

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
        name: of the model's input.
        datatype: as the protocol writes it, such as "BYTES", "UINT8" or "FP32".
        shape: not checked against the contents yet.
        contents: the bytes of Triton's binary layout (little-endian, row by row; before each element of BYTES its
            length in four bytes), or the values, flat or nested as JSON has them. A text among those of BYTES is
            base64, bytes are themselves.
        parameters: of the tensor.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    contents: bytes | memoryview | Values
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names, and how it wants it: `classification`, `binary_data`."""

    name: str
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request.

    Attributes:
        model_name: of the one model that is served.
        model_version: "" for whatever there is.
        id: the client's own, which its reply has too; "" for none.
        parameters: of the request.
        inputs: its tensors.
        outputs: that it wants; none for all.
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
        name: of the output.
        datatype: "FP32" or "BYTES".
        contents: of the output's shape: float32, or texts as objects.
    """

    name: str
    datatype: str
    contents: npt.NDArray[np.float32] | npt.NDArray[np.object_]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, the images first."""
        return self.contents.shape

    @property
    def values(self) -> list[float] | list[str]:
        """Its values, row by row."""
        values: list[float] | list[str] = self.contents.ravel().tolist()
        return values


@dataclass(frozen=True, slots=True)
class InferReply:
    """The reply to a request.

    Attributes:
        model_name: that answered.
        model_version: of it.
        id: the request's.
        parameters: what was decided for its images, and why.
        outputs: the tensors.
        answers: the same, of each image, as the pipeline gave them.
    """

    model_name: str
    model_version: str
    id: str
    parameters: Parameters
    outputs: tuple[OutputTensor, ...]
    answers: tuple[Classification, ...]
