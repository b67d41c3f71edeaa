from service.telemetry.stages import fields_of, stages_of
from tests.service.telemetry.answers import ARRIVED_AT, LARGE, ONE_LOOK, SMALL, answer


def test_the_fields_of_an_answer_describe_its_decision_and_its_deadline() -> None:
    assert fields_of([ONE_LOOK]) == {
        "patch_grid": 8,
        "keep_rate": 0.5,
        "gflops": 0.5,
        "reason": "alone",
        "looks": 1,
        "stopped": "sure",
        "batch_size": 4,
        "budget_ms": 1000.0,
        "slack_ms": 500.0,
        "deadline_met": True,
    }


def test_a_late_answer_has_negative_slack() -> None:
    late = fields_of([answer((SMALL, 100.375, 0.0625), budget_s=0.25)])
    assert (late["slack_ms"], late["deadline_met"]) == (-250.0, False)


def test_the_fields_of_several_answers_are_only_their_totals() -> None:
    answers = [ONE_LOOK, answer((LARGE, 100.375, 0.0625), budget_s=0.25)]
    assert fields_of(answers) == {"images": 2, "gflops": 2.5, "deadline_met": False}


def test_a_request_without_answers_has_no_fields_and_no_stages() -> None:
    assert fields_of([]) == {}
    assert stages_of([], ARRIVED_AT) == ()


def test_stages_follow_each_other_from_the_arrival_on() -> None:
    stages = stages_of([ONE_LOOK], ARRIVED_AT)
    assert [(stage.name, stage.began_at, stage.ended_at) for stage in stages] == [
        ("read", 100.0, 100.125),
        ("decode wait", 100.125, 100.1875),
        ("decode", 100.1875, 100.25),
        ("queue", 100.25, 100.375),
        ("inference", 100.375, 100.4375),
    ]
    assert stages[-1].fields == {"patch_grid": 8, "keep_rate": 0.5, "gflops": 0.5, "confidence": 0.75}


def test_each_look_has_its_own_queue_and_inference_stages() -> None:
    twice = answer((SMALL, 100.25, 0.0625), (LARGE, 100.375, 0.125))
    stages = stages_of([twice], ARRIVED_AT)[3:]
    assert [(stage.name, stage.began_at, stage.ended_at) for stage in stages] == [
        ("queue", 100.25, 100.25),
        ("inference", 100.25, 100.3125),
        ("queue", 100.3125, 100.375),
        ("inference", 100.375, 100.5),
    ]
    assert [stage.fields["gflops"] for stage in stages if stage.fields] == [0.5, 2.0]


def test_a_queue_stage_never_ends_before_it_begins_although_two_threads_read_the_clock() -> None:
    queue = stages_of([answer((SMALL, 100.2499, 0.0625))], ARRIVED_AT)[3]
    assert queue.began_at == queue.ended_at == 100.2499


def test_several_images_have_a_stage_each_with_parts_of_their_own() -> None:
    images = stages_of([ONE_LOOK, ONE_LOOK], ARRIVED_AT)
    assert [(image.name, image.began_at, image.ended_at) for image in images] == [("image", 100.0, 100.5)] * 2
    assert images[0].parts == stages_of([ONE_LOOK], ARRIVED_AT)
    assert images[0].fields == fields_of([ONE_LOOK])
