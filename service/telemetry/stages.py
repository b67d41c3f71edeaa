"""A request as logs and traces describe it: its outcome, its answers, and its stages from the recorded times."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from service.domain import Classification, Look
from service.telemetry.logs import Fields


class Outcome(NamedTuple):
    """How a request ended, as its protocol describes it.

    Attributes:
        line: for the log: the request and its status.
        name: for traces: the operation, with few different values.
        attributes: for traces: attributes by the names of OpenTelemetry's conventions.
        error: code of the error; None if the request did not fail.
        is_failure: whether the server failed, rather than the client.
    """

    line: str
    name: str
    attributes: Fields
    error: str | None = None
    is_failure: bool = False


class Stage(NamedTuple):
    """A part of a request's time.

    Attributes:
        name: name of the stage.
        began_at: on the monotonic clock, in seconds.
        ended_at: likewise.
        fields: values that describe the stage, by name.
        parts: stages within this one, as far as they are known.
    """

    name: str
    began_at: float
    ended_at: float
    fields: Fields
    parts: "tuple[Stage, ...]" = ()


def fields_of(answers: Sequence[Classification]) -> Fields:
    """Return the values that describe the answer to a request, by name; of several images, only their totals."""
    if not answers:
        return {}
    if len(answers) > 1:
        gflops = sum(answer.gflops for answer in answers)
        met = all(answer.deadline_met for answer in answers)
        return {"images": len(answers), "gflops": gflops, "deadline_met": met}
    (answer,) = answers
    subnetwork = answer.decision.profile.subnetwork
    return {
        "patch_grid": subnetwork.patch_grid,
        "keep_rate": subnetwork.keep_rate,
        "gflops": answer.gflops,
        "reason": answer.decision.code.value,
        "looks": len(answer.looks),
        "stopped": answer.stopped.value,
        "batch_size": answer.decision.batch_size,
        "budget_ms": _ms(answer.budget_s),
        "slack_ms": _ms(answer.budget_s - answer.timing.total_s),
        "deadline_met": answer.deadline_met,
    }


def stages_of(answers: Sequence[Classification], arrived_at: float) -> tuple[Stage, ...]:
    """Return the stages of a request that arrived at that instant; several images have one stage each, with parts."""
    if len(answers) == 1:
        return tuple(_stages(answers[0], arrived_at))
    return tuple(
        Stage(
            "image", arrived_at, arrived_at + each.timing.total_s, fields_of([each]), tuple(_stages(each, arrived_at))
        )
        for each in answers
    )


def _stages(answer: Classification, arrived_at: float) -> Iterator[Stage]:
    timing = answer.timing
    read_at = arrived_at + timing.read_s
    decoding_at = read_at + timing.decode_wait_s
    free_at = decoding_at + timing.decode_s
    yield Stage("read", arrived_at, read_at, {})
    yield Stage("decode wait", read_at, decoding_at, {})
    yield Stage("decode", decoding_at, free_at, {})
    for look in answer.looks:
        ended_at = look.started_at + look.inference_s
        yield Stage("queue", min(free_at, look.started_at), look.started_at, {})
        yield Stage("inference", look.started_at, ended_at, _fields_of_look(look))
        free_at = ended_at


def _fields_of_look(look: Look) -> Fields:
    subnetwork = look.profile.subnetwork
    return {
        "patch_grid": subnetwork.patch_grid,
        "keep_rate": subnetwork.keep_rate,
        "gflops": look.profile.gflops,
        "confidence": look.confidence,
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
