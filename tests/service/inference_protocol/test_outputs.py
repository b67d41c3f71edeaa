import json

import pytest

from service.errors import InvalidParameterError, InvalidTensorError
from service.inference_protocol.messages import RequestedOutput
from service.inference_protocol.outputs import WantedOutput, make_output, reply_parameters, wanted_outputs
from tests.service.inference_protocol.answers import answer

ANSWERS = (answer(0.25, 0.5, 0.125), answer(0.5, 0.125, 0.25))


def test_all_outputs_are_returned_unless_the_request_names_some() -> None:
    assert [output.name for output in wanted_outputs((), 3)] == ["probabilities", "labels"]
    assert [output.name for output in wanted_outputs((RequestedOutput("labels"),), 3)] == ["labels"]


def test_probabilities_are_in_the_order_of_the_classes() -> None:
    output = make_output(WantedOutput("probabilities"), ANSWERS, 2)
    assert (output.datatype, output.shape) == ("FP32", (2, 3))
    assert output.values == [0.25, 0.5, 0.125, 0.5, 0.125, 0.25]


def test_labels_are_listed_most_probable_first() -> None:
    output = make_output(WantedOutput("labels"), ANSWERS, 2)
    assert (output.datatype, output.shape, output.values) == ("BYTES", (2, 2), ["dog", "cat", "cat", "bird"])
    assert make_output(WantedOutput("labels"), ANSWERS[:1], 1).shape == (1, 1)


def test_a_classification_output_holds_value_index_and_label() -> None:
    output = make_output(WantedOutput("probabilities", 2), ANSWERS, 1)
    assert (output.datatype, output.shape) == ("BYTES", (2, 2))
    assert output.values == ["0.500000:1:dog", "0.250000:0:cat", "0.500000:0:cat", "0.250000:2:bird"]


def test_the_number_of_classes_is_capped_at_those_of_the_model() -> None:
    [wanted] = wanted_outputs((RequestedOutput("probabilities", {"classification": 99, "binary_data": True}),), 3)
    assert wanted.classes == 3


@pytest.mark.parametrize(
    ("name", "parameters", "error"),
    [
        ("logits", {}, InvalidTensorError),
        ("labels", {"classification": 1}, InvalidParameterError),
        ("probabilities", {"classification": -1}, InvalidParameterError),
        ("probabilities", {"classification": True}, InvalidParameterError),
        ("probabilities", {"classification": 1.5}, InvalidParameterError),
        ("probabilities", {"clasification": 1}, InvalidParameterError),
        ("probabilities", {"shared_memory_region": "x"}, InvalidParameterError),
    ],
)
def test_invalid_requested_outputs_are_refused(
    name: str, parameters: dict[str, bool | int | float | str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        wanted_outputs((RequestedOutput(name, parameters),), 3)


def test_an_output_named_twice_is_refused() -> None:
    with pytest.raises(InvalidTensorError, match="named twice"):
        wanted_outputs((RequestedOutput("labels"), RequestedOutput("labels")), 3)


def test_the_parameters_of_a_reply_describe_the_decision() -> None:
    assert reply_parameters(ANSWERS[:1]) == {
        "patch_grid": 4,
        "keep_rate": 0.5,
        "gflops": 2.0,
        "expected_accuracy": 0.75,
        "reason": "because",
        "looks": 1,
        "stopped": "sure",
        "deadline_met": True,
        "total_ms": 250.0,
    }


def test_reply_parameters_of_several_images_are_lists_in_json() -> None:
    parameters = reply_parameters((answer(1.0, grid=4), answer(1.0, grid=8)))
    assert parameters["patch_grid"] == "[4, 8]"
    assert json.loads(str(parameters["reason"])) == ["because", "because"]
    assert all(isinstance(value, str) for value in parameters.values())
