import asyncio
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from models.checkpoint import Checkpoint
from service.classifier import Classifier
from service.domain import Classification, InferenceRequest
from service.errors import (
    InvalidImageError,
    InvalidParameterError,
    InvalidTensorError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    ServiceError,
    UnknownModelError,
    UploadTimeoutError,
)
from service.health import FAILURES_IN_A_ROW, ServerFailures
from service.inference_protocol.messages import InferReply, InferRequest, InputTensor, Parameters, RequestedOutput
from service.inference_protocol.protocol import InferenceProtocol
from service.pipeline import Image, Pipeline, Read
from service.recent_answers import RecentAnswers
from service.telemetry.metrics import Metrics
from tests.service.inference_protocol.answers import answer

pytestmark = pytest.mark.anyio


class ScriptedPipeline:
    """Answers every image but those for which a test sets an error or holds the answer back; records its requests."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.asked: list[InferenceRequest] = []
        self.images: list[Image] = []
        self.errors: dict[Image, Exception] = {}
        self.room: ServiceError | None = None
        self.time_left = 0.5
        self.holds_back: set[Image] = set()

    def check_room(self) -> None:
        if self.room is not None:
            raise self.room

    def check(self, request: InferenceRequest) -> None:
        self.checked = request

    def time_left_s(self, _: InferenceRequest) -> float:
        return self.time_left

    async def classify(
        self, read: Read, request: InferenceRequest, watch: AbstractContextManager[object] | None, _: object
    ) -> Classification:
        with watch or nullcontext():
            self.asked.append(request)
            image = await read(1.0)
            self.images.append(image)
            if image in self.holds_back:
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            return self._answer(image)

    def _answer(self, image: Image) -> Classification:
        if error := self.errors.get(image):
            raise error
        return answer(0.25, 0.5, 0.125)


class Protocol:
    """A protocol over a scripted pipeline."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.pipeline, self.registry, self.failures = (
            ScriptedPipeline(checkpoint),
            CollectorRegistry(),
            ServerFailures(lambda: 1.0),
        )
        self.is_open = True
        metrics = Metrics(self.registry)
        self.protocol = InferenceProtocol(
            lambda: [checkpoint],
            metrics,
            Classifier(metrics, 100, RecentAnswers()),
            self.failures,
            self.open,
            lambda: 1000.0,
        )

    def open(self) -> list[Pipeline]:
        if not self.is_open:
            raise NotReadyError("not yet")
        return [cast(Pipeline, self.pipeline)]

    async def infer(self, *images: bytes | str, parameters: Parameters | None = None) -> InferReply:
        return await self.ask(InputTensor("image", "BYTES", (len(images),), images), parameters=parameters)

    async def ask(
        self,
        *inputs: InputTensor,
        parameters: Parameters | None = None,
        outputs: tuple[RequestedOutput, ...] = (),
        name: str = "tiny",
        version: str = "",
    ) -> InferReply:
        request = InferRequest(name, version, "7", parameters or {}, inputs, outputs)
        return await self.protocol.infer(
            request, 999.0, query={"budget_ms": "50"}, headers={"x-priority": "-2"}, address="a"
        )

    def outcomes(self) -> dict[str, float]:
        samples = [sample for family in self.registry.collect() for sample in family.samples]
        requests = [sample for sample in samples if sample.name == "supervit_requests_total"]
        return {sample.labels["outcome"]: sample.value for sample in requests}


@pytest.fixture
def served(checkpoint: Checkpoint) -> Protocol:
    return Protocol(checkpoint)


async def test_each_image_is_a_separate_request_with_the_parameters_of_body_query_and_headers(served: Protocol) -> None:
    await served.infer(b"first", b"second", parameters={"budget_gflops": 2, "top_k": 2})
    assert served.pipeline.images == [b"first", b"second"]
    asked = InferenceRequest(999.0, 50, budget_gflops=2, top_k=2, priority=-2, address="a")
    assert served.pipeline.asked == [replace(asked, num_together=2), replace(asked, image=1)]
    assert served.pipeline.checked.num_together == 2
    assert served.outcomes() == {"ok": 2}


@dataclass(frozen=True, slots=True)
class Trial:
    """A protocol over two models, of which the second is on trial and drawn for every request."""

    protocol: InferenceProtocol
    old: ScriptedPipeline
    new: ScriptedPipeline

    async def infer(self, name: str, version: str = "") -> InferReply:
        request = InferRequest(name, version, "7", {}, (InputTensor("image", "BYTES", (1,), [b"a"]),), ())
        return await self.protocol.infer(request, 999.0, query={}, headers={})


def trial_of(old: Checkpoint, new: Checkpoint) -> Trial:
    pipelines, metrics = (ScriptedPipeline(old), ScriptedPipeline(new)), Metrics(CollectorRegistry())
    drawn = [cast(Pipeline, pipeline) for pipeline in reversed(pipelines)]
    classifier, failures = Classifier(metrics, 100, RecentAnswers()), ServerFailures(lambda: 1.0)
    protocol = InferenceProtocol(lambda: [old, new], metrics, classifier, failures, lambda: drawn, lambda: 1000.0)
    return Trial(protocol, *pipelines)


async def test_the_model_drawn_for_a_request_answers_it_unless_the_request_names_another(
    checkpoint: Checkpoint,
) -> None:
    trial = trial_of(checkpoint, replace(checkpoint, version="fff"))
    drawn = await trial.infer("tiny")
    named = await trial.infer("tiny", checkpoint.version)
    assert [reply.parameters["checkpoint"] for reply in (drawn, named)] == ["fff", checkpoint.version]
    assert (len(trial.new.asked), len(trial.old.asked)) == (1, 1)


async def test_two_models_of_different_names_can_both_be_requested(checkpoint: Checkpoint) -> None:
    trial = trial_of(checkpoint, replace(checkpoint, name="other", version="fff"))
    for name in ("tiny", "other"):
        assert (await trial.infer(name)).model_name == name
        assert trial.protocol.model_metadata(name)["name"] == name
    with pytest.raises(UnknownModelError, match="'tiny' is served"):
        await trial.infer("third")
    assert [each["name"] for each in trial.protocol.repository_index()] == ["tiny"]


async def test_the_pipeline_is_asked_for_as_many_classes_as_any_output_needs(served: Protocol) -> None:
    output = RequestedOutput("probabilities", {"classification": 6})
    await served.ask(InputTensor("image", "BYTES", (1,), [b"a"]), outputs=(output,), parameters={"top_k": 2})
    assert served.pipeline.asked[0].top_k == 6


async def test_a_text_is_base64_or_a_data_url(served: Protocol) -> None:
    await served.infer("aGk=", "data:image/png;base64,aG8=")
    assert served.pipeline.images == [b"hi", b"ho"]
    with pytest.raises(InvalidImageError, match="must be base64"):
        await served.infer("???")


async def test_one_failing_image_cancels_the_others_and_fails_the_request_with_its_error(served: Protocol) -> None:
    served.pipeline.errors[b"broken"] = InvalidImageError("no image")
    served.pipeline.holds_back.add(b"slow")
    with pytest.raises(InvalidImageError, match="no image"):
        await served.infer(b"slow", b"broken", b"slow")
    assert served.outcomes() == {"invalid_image": 3}


async def test_an_image_that_fails_before_the_others_begin_keeps_them_from_beginning(served: Protocol) -> None:
    with pytest.raises(InvalidImageError, match="must be base64"):
        await served.infer("!!!!", "aGk=", "aG8=")
    assert served.pipeline.images == []
    assert served.outcomes() == {"invalid_image": 3}


async def test_a_reply_names_the_model_and_the_request(served: Protocol) -> None:
    request = InferRequest("tiny", "1", "7", {}, (InputTensor("image", "BYTES", (1,), [b"a"]),))
    reply = await served.protocol.infer(request, 999.0, query={}, headers={})
    assert (reply.model_name, reply.model_version, reply.id) == ("tiny", "1", "7")
    assert [output.name for output in reply.outputs] == ["probabilities", "labels"]


@pytest.mark.parametrize("version", ["", "1", "0123456789ab"])
async def test_the_version_may_be_omitted_or_one_or_the_checkpoints(served: Protocol, version: str) -> None:
    served.protocol.require_model("tiny", version)
    assert served.protocol.model_metadata("tiny", version)["versions"] == ["1"]


@pytest.mark.parametrize(("name", "version"), [("huge", ""), ("tiny", "2"), ("", "")])
async def test_every_call_refuses_an_unknown_model_or_version(served: Protocol, name: str, version: str) -> None:
    protocol = served.protocol
    for ask in (protocol.require_model, protocol.model_metadata, protocol.model_config):
        with pytest.raises(UnknownModelError):
            ask(name, version)
    with pytest.raises(UnknownModelError):
        await served.ask(InputTensor("image", "BYTES", (1,), [b"a"]), name=name, version=version)
    assert served.outcomes() == {"unknown_model": 1}


async def test_a_request_must_have_exactly_one_input(served: Protocol) -> None:
    image = InputTensor("image", "BYTES", (1,), [b"a"])
    for inputs in ((), (image, image)):
        with pytest.raises(InvalidTensorError, match=f"must have one input, 'image', not {len(inputs)}"):
            await served.ask(*inputs)


async def test_a_request_that_arrives_too_late_is_counted_once_as_an_upload_timeout(served: Protocol) -> None:
    served.pipeline.time_left = 0.0
    with pytest.raises(UploadTimeoutError):
        await served.infer(b"a", b"b")
    assert served.outcomes() == {"upload_timeout": 1}


async def test_a_request_is_checked_and_the_time_for_its_body_computed_before_the_body_arrives(
    served: Protocol,
) -> None:
    protocol, pipeline = served.protocol, served.pipeline
    assert protocol.check_before_body(999.0, {"budget_ms": "9"}, {}, 30.0) == 0.5
    assert protocol.check_before_body(999.0, {}, {}, 30.0) == 30.0
    assert protocol.check_before_body(999.0, {"budget_ms": "9"}, {}, 0.25) == 0.25
    with pytest.raises(InvalidParameterError):
        protocol.check_before_body(999.0, {"budget": "9"}, {}, 30.0)
    pipeline.room = OverloadedError("full", "full", 1.0)
    with pytest.raises(OverloadedError):
        protocol.check_before_body(999.0, {}, {}, 30.0)


async def test_the_protocol_is_ready_while_requests_are_taken_and_do_not_all_fail_inside_the_server(
    served: Protocol,
) -> None:
    assert served.protocol.is_ready()
    assert served.protocol.repository_index()[0]["state"] == "READY"
    served.pipeline.errors[b"a"] = OutOfMemoryError("none left")
    for _ in range(FAILURES_IN_A_ROW):
        with pytest.raises(OutOfMemoryError):
            await served.infer(b"a")
    assert not served.protocol.is_ready()
    await served.infer(b"b")
    assert served.protocol.is_ready()
    served.is_open = False
    assert not served.protocol.is_ready()
    assert served.protocol.repository_index()[0]["state"] == "UNAVAILABLE"


async def test_metadata_and_configuration_describe_the_same_tensors(served: Protocol) -> None:
    metadata, config = served.protocol.model_metadata("tiny"), served.protocol.model_config("tiny")
    assert config["max_batch_size"] == 16
    assert config["parameters"]["checkpoint_version"] == {"string_value": "0123456789ab"}
    for ours, tritons in (("inputs", "input"), ("outputs", "output")):
        described = [(tensor["name"], tensor["shape"]) for tensor in metadata[ours]]
        assert described == [(tensor["name"], [-1, *tensor["dims"]]) for tensor in config[tritons]]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["probabilities", "labels"]
    assert metadata["outputs"][0]["shape"] == [-1, 7]


async def test_the_statistics_count_every_request(served: Protocol) -> None:
    served.pipeline.errors[b"broken"] = InvalidImageError("no image")
    await served.infer(b"a", b"b")
    with pytest.raises(InvalidImageError):
        await served.infer(b"broken")
    [statistics] = served.protocol.statistics()["model_stats"]
    assert (statistics["name"], statistics["version"]) == ("tiny", "1")
    assert statistics["inference_count"] == 2
    stats = statistics["inference_stats"]
    assert stats["success"] == {"count": 2, "ns": 500_000_000}
    assert stats["queue"] == {"count": 2, "ns": 40_000_000}
    assert stats["compute_infer"] == {"count": 2, "ns": 200_000_000}
    assert stats["fail"]["count"] == 1
    with pytest.raises(UnknownModelError):
        served.protocol.statistics("huge")
