import grpc
import numpy as np
import pytest
from google.protobuf.wrappers_pb2 import Int64Value

from models.checkpoint import Checkpoint
from service.errors import InvalidTensorError
from service.rpc import tensorflow_serving_pb2 as tf
from service.rpc.tensorflow_service import MODEL_SERVICE, PREDICTION_SERVICE, read_request
from tests.service.rpc.conftest import Served, failure_of

pytestmark = pytest.mark.anyio

TINY = tf.ModelSpec(name="tiny", version=Int64Value(value=0))  # OpenVINO's client sends 0 for any version


def tensor_of(dtype: int, shape: tuple[int, ...], **contents: object) -> tf.TensorProto:
    dims = [tf.TensorShapeProto.Dim(size=size) for size in shape]
    return tf.TensorProto(dtype=dtype, tensor_shape=tf.TensorShapeProto(dim=dims), **contents)  # type: ignore[arg-type] # the names are those of the fields


async def predict(served: Served, image: tf.TensorProto, *outputs: str) -> tf.PredictResponse:
    request = tf.PredictRequest(model_spec=TINY, inputs={"image": image}, output_filter=outputs)
    return await served.call("Predict", request, tf.PredictResponse, service=PREDICTION_SERVICE)


@pytest.mark.parametrize(("shape", "number"), [((), 1), ((1,), 1), ((2,), 2), ((2, 1), 2)])
async def test_image_files_are_sent_as_strings(
    served: Served, photo: bytes, shape: tuple[int, ...], number: int
) -> None:
    response = await predict(served, tensor_of(tf.DT_STRING, shape, string_val=[photo] * number))
    probabilities = response.outputs["probabilities"]
    values = np.frombuffer(probabilities.tensor_content, "<f4").reshape(number, -1)
    assert [dim.size for dim in probabilities.tensor_shape.dim] == [number, 7]
    assert values.sum(axis=1) == pytest.approx(1)
    assert response.outputs["labels"].string_val[0] == f"thing {values[0].argmax()}".encode()
    assert (response.model_spec.name, response.model_spec.version.value) == ("tiny", 1)


async def test_pixels_may_be_sent_as_bytes_or_as_lists(served: Served, checkpoint: Checkpoint) -> None:
    side = checkpoint.config.image_side
    pixels = np.arange(3 * side * side, dtype=np.uint8).reshape(1, 3, side, side)
    scaled = (pixels / 255).astype("<f4")
    labels = [
        (await predict(served, image, "labels")).outputs["labels"].string_val
        for image in (
            tensor_of(tf.DT_UINT8, pixels.shape, tensor_content=pixels.tobytes()),
            tensor_of(tf.DT_UINT8, pixels.shape, int_val=pixels.ravel().tolist()),
            tensor_of(tf.DT_FLOAT, pixels.shape, tensor_content=scaled.tobytes()),
            tensor_of(tf.DT_FLOAT, pixels.shape, float_val=scaled.ravel().tolist()),
        )
    ]
    assert all(each == labels[0] for each in labels)


async def test_only_the_requested_outputs_are_sent(served: Served, photo: bytes) -> None:
    response = await predict(served, tensor_of(tf.DT_STRING, (1,), string_val=[photo]), "labels")
    assert set(response.outputs) == {"labels"}


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_too_many_tensors_are_refused(kind: str) -> None:
    names = [str(number) for number in range(17)]
    inputs = {"inputs": {name: tf.TensorProto() for name in names}, "outputs": {}}[kind]
    request = tf.PredictRequest(inputs=inputs, output_filter=names if kind == "outputs" else ())
    with pytest.raises(InvalidTensorError, match=f"{kind}: a request may have at most 16, not 17"):
        read_request(request)


async def test_other_datatypes_are_refused(served: Served) -> None:
    status, message, _ = await failure_of(predict(served, tensor_of(tf.DT_DOUBLE, (1, 3, 2, 2))))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert "choose from BYTES, UINT8, FP32" in message
    assert served.count("invalid_tensor") == 1


async def test_the_model_reports_its_metadata_and_its_status(served: Served) -> None:
    asked = tf.GetModelMetadataRequest(model_spec=TINY, metadata_field=["signature_def"])
    described = await served.call("GetModelMetadata", asked, tf.GetModelMetadataResponse, service=PREDICTION_SERVICE)
    signatures = tf.SignatureDefMap()
    assert described.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["serving_default"]
    assert signature.inputs["image"].dtype == tf.DT_STRING
    assert [dim.size for dim in signature.outputs["probabilities"].tensor_shape.dim] == [-1, 7]
    status = tf.GetModelStatusRequest(model_spec=TINY)
    (version,) = (
        await served.call("GetModelStatus", status, tf.GetModelStatusResponse, service=MODEL_SERVICE)
    ).model_version_status
    assert (version.version, version.state) == (1, tf.ModelVersionStatus.AVAILABLE)


@pytest.mark.parametrize(
    "spec",
    [
        tf.ModelSpec(name="other"),
        tf.ModelSpec(name="tiny", version=Int64Value(value=2)),
        tf.ModelSpec(name="tiny", version_label="stable"),
    ],
)
async def test_another_model_or_version_is_not_found(served: Served, spec: tf.ModelSpec) -> None:
    asked = tf.GetModelStatusRequest(model_spec=spec)
    call = served.call("GetModelStatus", asked, tf.GetModelStatusResponse, service=MODEL_SERVICE)
    assert (await failure_of(call))[0] is grpc.StatusCode.NOT_FOUND
