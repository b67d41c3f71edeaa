"""Turns answers into the output tensors and the parameters of a reply."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from service.domain import Classification
from service.errors import InvalidParameterError, InvalidTensorError
from service.inference_protocol.messages import OutputTensor, Parameter, RequestedOutput

PROBABILITIES, LABELS = "probabilities", "labels"
OUTPUTS = (PROBABILITIES, LABELS)
OUTPUT_PARAMETERS = frozenset(("binary_data", "classification", "content_type"))


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output that a request wants; of probabilities, the best `classes` as "value:index:label", unless that is 0."""

    name: str
    classes: int = 0


def wanted_outputs(requested: Sequence[RequestedOutput], num_classes: int) -> tuple[WantedOutput, ...]:
    """Return the outputs that a request wants; all of them if it names none.

    Raises:
        InvalidTensorError: there is no output of a name, or an output is named twice.
        InvalidParameterError: a parameter of an output is unusable.
    """
    if not requested:
        return tuple(map(WantedOutput, OUTPUTS))
    names = [output.name for output in requested]
    for name in names:
        if name not in OUTPUTS:
            raise InvalidTensorError(f"{name}: unknown output; choose from {', '.join(OUTPUTS)}")
        if names.count(name) > 1:
            raise InvalidTensorError(f"{name}: the output is named twice")
    return tuple(WantedOutput(output.name, _classes(output, num_classes)) for output in requested)


def _classes(output: RequestedOutput, num_classes: int) -> int:
    for name in output.parameters:
        if name.startswith("shared_memory"):
            raise InvalidParameterError(f"{name}: shared memory is not supported", parameter=name)
        if name not in OUTPUT_PARAMETERS:
            raise InvalidParameterError(f"{name}: unknown output parameter", parameter=name)
    classes = output.parameters.get("classification", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise InvalidParameterError("classification: must be a number of classes", parameter="classification")
    if classes and output.name != PROBABILITIES:
        raise InvalidParameterError(f"classification: only available for {PROBABILITIES}", parameter="classification")
    return min(classes, num_classes)


def make_output(wanted: WantedOutput, answers: Sequence[Classification], top_k: int) -> OutputTensor:
    """Make an output tensor.

    Args:
        wanted: the output to make.
        answers: one answer for each of N images.
        top_k: number of labels for each image.

    Returns:
        `probabilities`, (N, C) as FP32, or (N, classes) strings "value:index:label" as BYTES; or `labels`, (N, top_k)
        as BYTES, the most probable first.
    """
    if wanted.name == LABELS:
        labels = [[prediction.label for prediction in answer.predictions[:top_k]] for answer in answers]
        return OutputTensor(LABELS, "BYTES", np.array(labels, np.object_))
    if wanted.classes:
        rows = [_classified(answer, wanted.classes) for answer in answers]
        return OutputTensor(PROBABILITIES, "BYTES", np.array(rows, np.object_))
    return OutputTensor(PROBABILITIES, "FP32", np.stack([answer.probabilities for answer in answers]))


def _classified(answer: Classification, classes: int) -> list[str]:
    best = answer.predictions[:classes]
    return [f"{prediction.probability:f}:{prediction.index}:{prediction.label}" for prediction in best]


def reply_parameters(answers: Sequence[Classification]) -> Mapping[str, Parameter]:
    """Return what was decided; for several images, each value is a JSON list, since parameters are scalars."""
    decisions = [_decision(answer) for answer in answers]
    if len(decisions) == 1:
        return {name: value for name, value in decisions[0].items() if value is not None}
    return {name: json.dumps([decision[name] for decision in decisions]) for name in decisions[0]}


def _decision(answer: Classification) -> dict[str, Parameter | None]:
    subnetwork = answer.decision.profile.subnetwork
    return {
        "patch_grid": subnetwork.patch_grid,
        "keep_rate": subnetwork.keep_rate,
        "gflops": answer.gflops,
        "expected_accuracy": answer.decision.profile.top1,
        "reason": answer.decision.reason,
        "looks": len(answer.looks),
        "stopped": answer.stopped.value,
        "deadline_met": answer.deadline_met,
        "total_ms": round(1000 * answer.timing.total_s, 3),
    }
