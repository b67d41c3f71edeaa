"""Answers the Open Inference Protocol: inference by the pipeline, metadata of the server and the model, statistics."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from models.checkpoint import Checkpoint
from service.classifier import Classifier
from service.decoding.base64_text import decode_base64
from service.domain import DEFAULT_TOP_K, ApiKey, Classification, InferenceRequest
from service.errors import InvalidTensorError, NotReadyError, UnknownModelError, UploadTimeoutError
from service.health import ServerFailures
from service.inference_protocol.descriptions import VERSION, describe_config, describe_model, describe_statistics
from service.inference_protocol.image_group import ImageGroup
from service.inference_protocol.images import INPUT, InputImage, images_of
from service.inference_protocol.messages import InferReply, InferRequest
from service.inference_protocol.outputs import WantedOutput, make_output, reply_parameters, wanted_outputs
from service.inference_protocol.parameters import parameters_of
from service.pipeline import Image, Pipeline, Read
from service.telemetry.inference_statistics import read_statistics
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counting_failures

SERVER_NAME = "supervit-serve"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository(index)",
    "parameters",
    "schedule_policy",
    "statistics",
)

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a request asks for, its images, and the outputs that it wants."""

    wanted: InferenceRequest
    images: list[InputImage]
    outputs: tuple[WantedOutput, ...]
    top_k: int


class InferenceProtocol:
    """Answers the calls of the protocol for the served model, over any transport."""

    def __init__(
        self,
        checkpoints: Callable[[], Sequence[Checkpoint]],
        metrics: Metrics,
        classifier: Classifier,
        failures: ServerFailures,
        open_pipelines: Callable[[], Sequence[Pipeline]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the protocol from its collaborators.

        Args:
            checkpoints: returns the checkpoints that answer requests, first the one that answers most of them.
            metrics: the server's metrics.
            classifier: classifies images.
            failures: counts the server's own failures.
            open_pipelines: returns the pipelines that may answer a request, first the one drawn for it; raises a
                NotReadyError while no requests are taken.
            clock: monotonic, in seconds.
        """
        self._checkpoints, self._metrics, self._classifier = checkpoints, metrics, classifier
        self._failures, self._open_pipelines, self._clock = failures, open_pipelines, clock

    def is_ready(self) -> bool:
        """Return whether requests are taken and do not all fail for reasons of the server's own."""
        try:
            self._open_pipelines()
        except NotReadyError:
            return False
        return not self._failures.is_persistent

    def require_model(self, name: str, version: str = "") -> None:
        """Check that a model is served; its version may be left out, or be 1 or the checkpoint's.

        Raises:
            UnknownModelError: the model is not served.
        """
        self._find(name, version)

    def server_metadata(self) -> JsonObject:
        """Return the name and the version of the server, and the protocol's extensions that it supports."""
        return {"name": SERVER_NAME, "version": metadata.version(SERVER_NAME), "extensions": list(EXTENSIONS)}

    def model_metadata(self, name: str, version: str = "") -> JsonObject:
        """Describe the model's inputs and outputs; errors as `require_model`."""
        return describe_model(self._find(name, version))

    def model_config(self, name: str, version: str = "") -> JsonObject:
        """Describe the model as Triton's configuration does; errors as `require_model`."""
        return describe_config(self._find(name, version))

    def statistics(self, name: str = "", version: str = "") -> JsonObject:
        """Return Triton's statistics of all requests, of every protocol; errors as `require_model`.

        Reading every metric takes milliseconds, and longer with several workers: call it on a thread.
        """
        checkpoint = self._find(name or self._checkpoints()[0].name, version)
        return describe_statistics(checkpoint, read_statistics(self._metrics.registry()))

    def repository_index(self) -> list[JsonObject]:
        """List the served model."""
        checkpoint, is_ready = self._checkpoints()[0], self.is_ready()
        state, reason = ("READY", "") if is_ready else ("UNAVAILABLE", "the model is not accepting requests")
        return [{"name": checkpoint.name, "version": VERSION, "state": state, "reason": reason}]

    def check_before_body(
        self,
        arrived_at: float,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        max_s: float,
        key: ApiKey | None = None,
    ) -> float:
        """Check a request before its body has arrived, and return how long the body may take.

        Args:
            arrived_at: when the first byte of the request arrived.
            query: query parameters of its URL.
            headers: headers, by names in lower case.
            max_s: longest time, whatever latency budget its query or headers name.
            key: API key of the request.

        Raises:
            ServiceError: the request is rejected, whatever its body holds.
        """
        pipeline = self._open_pipelines()[0]
        pipeline.check_room()
        alone = parameters_of({}, query, headers).request(arrived_at, key=key)
        pipeline.check(alone)
        return max_s if alone.budget_ms is None else min(max_s, pipeline.time_left_s(alone))

    async def infer(
        self,
        request: InferRequest,
        arrived_at: float,
        *,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        address: str | None = None,
        key: ApiKey | None = None,
        client_waits_s: float | None = None,
        watch: AbstractContextManager[object] | None = None,
    ) -> InferReply:
        """Answer a request, each image of which is queued, counted and answered as a request of its own.

        Args:
            request: the complete request.
            arrived_at: when its first byte arrived, on `clock`.
            query: query parameters of its URL.
            headers: headers or metadata, by names in lower case.
            address: address of the client; None if it is not known.
            key: API key of the request; None if the server asks for none.
            client_waits_s: time from arrival after which the client is gone; None if the client stays.
            watch: raises a ClientGoneError out of its block once the client has left; entered for each image.

        Raises:
            ServiceError: the request is rejected, or an image fails, which makes the others fail, too.
        """
        with counting_failures(self._metrics, key):
            pipeline = self._open(request)
            plan = _plan(request, pipeline.checkpoint, query, headers, arrived_at, address, key, client_waits_s)
            pipeline.check(plan.wanted)
            if pipeline.time_left_s(plan.wanted) <= 0:
                raise UploadTimeoutError("the request did not arrive within the latency budget")
        with self._failures.counting():
            answers = await self._classify(pipeline, plan, watch)
        outputs = tuple(make_output(output, answers, plan.top_k) for output in plan.outputs)
        name = pipeline.checkpoint.name
        parameters = {**reply_parameters(answers), "checkpoint": pipeline.checkpoint.version}
        return InferReply(name, VERSION, request.id, parameters, outputs, answers)

    def _find(self, name: str, version: str) -> Checkpoint:
        """Return the served checkpoint of a name and a version; errors as `require_model`."""
        served = self._checkpoints()
        for checkpoint in served:
            if _is_named(checkpoint, name, version):
                return checkpoint
        raise _unknown(served[0], name, version)

    def _open(self, request: InferRequest) -> Pipeline:
        """Return the pipeline for a request: the one drawn for it, unless it names another; errors as `infer`."""
        name, version = request.model_name, request.model_version
        for pipeline in self._open_pipelines():
            if _is_named(pipeline.checkpoint, name, version):
                return pipeline
        raise _unknown(self._checkpoints()[0], name, version)

    async def _classify(
        self, pipeline: Pipeline, plan: _Plan, watch: AbstractContextManager[object] | None
    ) -> tuple[Classification, ...]:
        if len(plan.images) == 1:
            return (await self._classifier.classify(pipeline, _reading(plan.images[0]), plan.wanted, watch),)
        together, number = ImageGroup(watch), len(plan.images)
        each = [replace(plan.wanted, image=place, num_together=number - place) for place in range(number)]
        answers = await asyncio.gather(
            *(
                self._classifier.classify(pipeline, _reading(image), wanted, together)
                for image, wanted in zip(plan.images, each, strict=True)
            ),
            return_exceptions=True,
        )
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:
            raise failures[0]
        return tuple(answer for answer in answers if not isinstance(answer, BaseException))


def _plan(
    request: InferRequest,
    checkpoint: Checkpoint,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    arrived_at: float,
    address: str | None,
    key: ApiKey | None,
    client_waits_s: float | None,
) -> _Plan:
    if len(request.inputs) != 1:
        raise InvalidTensorError(f"the request must have one input, {INPUT!r}, not {len(request.inputs)}")
    num_classes = len(checkpoint.class_names)
    parameters = parameters_of(request.parameters, query, headers)
    outputs = wanted_outputs(request.outputs, num_classes)
    top_k = parameters.top_k or min(DEFAULT_TOP_K, num_classes)
    listed = max(top_k, *(output.classes for output in outputs))
    images = images_of(request.inputs[0], checkpoint.config.image_side)
    wanted = replace(
        parameters.request(arrived_at, address, key),
        top_k=listed,
        client_waits_s=client_waits_s,
        num_together=len(images),
    )
    return _Plan(wanted, images, outputs, top_k)


def _is_named(checkpoint: Checkpoint, name: str, version: str) -> bool:
    return name == checkpoint.name and version in ("", VERSION, checkpoint.version)


def _unknown(current: Checkpoint, name: str, version: str) -> UnknownModelError:
    """Return the error for a model that is not served while `current` answers most requests."""
    if name != current.name:
        return UnknownModelError(f"unknown model {name!r}; {current.name!r} is served", model=current.name)
    return UnknownModelError(f"unknown version {version!r} of {name}; {VERSION!r} is served", version=VERSION)


def _reading(image: InputImage) -> Read:
    async def read(_: float) -> Image:
        return await decode_base64(image, INPUT) if isinstance(image, str) else image

    return read
