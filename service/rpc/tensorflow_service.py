"""TensorFlow Serving's services, which OpenVINO's client uses; `InferenceProtocol` answers them, too."""

from collections.abc import Iterable, Sequence

import grpc
from google.protobuf.wrappers_pb2 import Int64Value

from service.inference_protocol.messages import InferReply, InferRequest, InputTensor, OutputTensor, RequestedOutput
from service.inference_protocol.tensors import to_raw
from service.rpc import tensorflow_serving_pb2 as tf
from service.rpc.call_handling import CallHandling, Messages
from service.rpc.calls import Call
from service.rpc.messages import require_few_tensors

PREDICTION_SERVICE, MODEL_SERVICE = "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"
DATATYPES = {"BYTES": tf.DT_STRING, "FP32": tf.DT_FLOAT, "UINT8": tf.DT_UINT8}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
SIGNATURES, SIGNATURE = "signature_def", "serving_default"
METHOD = "tensorflow/serving/predict"


class TensorflowService:
    """Answers the calls of PredictionService and ModelService."""

    def __init__(self, answering: CallHandling) -> None:
        """Create the services; `answering` is what all services share."""
        self._answering, self._protocol = answering, answering.protocol

    def handlers(self) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
        """Make the handlers to register with a gRPC server."""
        method = self._answering.method
        predictions = {
            "Predict": method(f"{PREDICTION_SERVICE}/Predict", self._predict),
            "GetModelMetadata": method(f"{PREDICTION_SERVICE}/GetModelMetadata", self._model_metadata),
        }
        models = {"GetModelStatus": method(f"{MODEL_SERVICE}/GetModelStatus", self._model_status)}
        return (
            grpc.method_handlers_generic_handler(PREDICTION_SERVICE, predictions),
            grpc.method_handlers_generic_handler(MODEL_SERVICE, models),
        )

    async def _predict(self, messages: Messages, call: Call) -> tf.PredictResponse:
        key = self._answering.key_of(call)
        request = await self._answering.read_request(messages, call, key, tf.PredictRequest, read_request)
        return write_reply(await self._answering.infer(request, call, key))

    async def _model_metadata(self, messages: Messages, call: Call) -> tf.GetModelMetadataResponse:
        asked = await self._answering.read(messages, call, tf.GetModelMetadataRequest)
        described = self._protocol.model_metadata(asked.model_spec.name, _version(asked.model_spec))
        inputs, outputs = (
            {
                each["name"]: tf.TensorInfo(
                    name=each["name"], dtype=DATATYPES[each["datatype"]], tensor_shape=_shape(each["shape"])
                )
                for each in described[kind]
            }
            for kind in ("inputs", "outputs")
        )
        signature = tf.SignatureDef(inputs=inputs, outputs=outputs, method_name=METHOD)
        response = tf.GetModelMetadataResponse(model_spec=_spec(described["name"], described["versions"][0]))
        response.metadata[SIGNATURES].Pack(tf.SignatureDefMap(signature_def={SIGNATURE: signature}))
        return response

    async def _model_status(self, messages: Messages, call: Call) -> tf.GetModelStatusResponse:
        asked = await self._answering.read(messages, call, tf.GetModelStatusRequest)
        described = self._protocol.model_metadata(asked.model_spec.name, _version(asked.model_spec))
        state = "AVAILABLE" if self._protocol.is_ready() else "LOADING"
        status = tf.ModelVersionStatus(version=int(described["versions"][0]), state=state, status=tf.StatusProto())
        return tf.GetModelStatusResponse(model_version_status=[status])


def read_request(message: tf.PredictRequest) -> InferRequest:
    """Read a request; the contents of its tensors are not converted.

    Raises:
        InvalidTensorError: there are too many tensors.
    """
    require_few_tensors(message.inputs, message.output_filter)
    return InferRequest(
        message.model_spec.name,
        _version(message.model_spec),
        "",
        {},
        tuple(_read_tensor(name, tensor) for name, tensor in message.inputs.items()),
        tuple(map(RequestedOutput, message.output_filter)),
    )


def _read_tensor(name: str, tensor: tf.TensorProto) -> InputTensor:
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim) or (1,)  # a scalar is one image, too
    datatype = NAMES.get(tensor.dtype, f"DT_{tensor.dtype}")
    contents: bytes | Sequence[object]
    match tensor.dtype:
        case tf.DT_STRING:
            contents = tensor.string_val
        case tf.DT_FLOAT:
            contents = tensor.tensor_content or tensor.float_val
        case tf.DT_UINT8:
            contents = tensor.tensor_content or tensor.int_val
        case _:
            contents = ()
    return InputTensor(name, datatype, shape, contents)


def write_reply(reply: InferReply) -> tf.PredictResponse:
    """Write a reply."""
    return tf.PredictResponse(
        model_spec=_spec(reply.model_name, reply.model_version),
        outputs={tensor.name: _write_tensor(tensor) for tensor in reply.outputs},
    )


def _write_tensor(tensor: OutputTensor) -> tf.TensorProto:
    written = tf.TensorProto(dtype=DATATYPES[tensor.datatype], tensor_shape=_shape(tensor.shape))
    if tensor.datatype == "BYTES":
        written.string_val.extend(str(value).encode() for value in tensor.values)
    else:
        written.tensor_content = to_raw(tensor)
    return written


def _shape(sizes: Iterable[int]) -> tf.TensorShapeProto:
    return tf.TensorShapeProto(dim=[tf.TensorShapeProto.Dim(size=size) for size in sizes])


def _spec(name: str, version: str) -> tf.ModelSpec:
    return tf.ModelSpec(name=name, version=Int64Value(value=int(version)))


def _version(spec: tf.ModelSpec) -> str:
    """Return the version that is asked for, "" for any."""
    return spec.version_label or (str(spec.version.value) if spec.version.value else "")
