"""Graphs like those of PyTorch's exporter, built node by node: weights of linear layers are nameless and transposed."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from models.conversion.onnx_weights import read_onnx_weights
from models.files.checkpoint_errors import UnreadableCheckpointError


def constant(name: str, tensor: Tensor) -> TensorProto:
    return numpy_helper.from_array(tensor.numpy(), name)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Tensor, Tensor]:
    """A linear layer over a position embedding in two parts, that of the class token and that of the patches."""
    torch.manual_seed(1)
    weight, positions = torch.randn(3, 4), torch.randn(1, 5, 4)
    nodes = [
        helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["patches"], "/vit/embeddings/Reshape"),
        helper.make_node("Concat", ["onnx::Concat_1", "patches"], ["rows"], "/vit/embeddings/Concat", axis=1),
        helper.make_node("Add", ["tokens", "rows"], ["sum"], "/vit/embeddings/Add"),
        helper.make_node("Add", ["sum", "vit.embeddings.cls_token"], ["more"], "/vit/embeddings/Add_1"),
        helper.make_node("MatMul", ["more", "onnx::MatMul_3"], ["product"], "/vit/layers/layers.0/fc1/MatMul"),
        helper.make_node("Add", ["product", "vit.layers.0.fc1.bias"], ["out"], "/vit/layers/layers.0/fc1/Add"),
    ]
    weights = [
        constant("onnx::Concat_1", positions[:, :1]),
        constant("onnx::Reshape_2", positions[:, 1:]),
        constant("onnx::MatMul_3", weight.T.contiguous()),
        constant("vit.embeddings.cls_token", torch.full((1, 1, 4), 2.0)),
        constant("vit.layers.0.fc1.bias", torch.ones(3)),
        numpy_helper.from_array(np.array([1, 4, 4], np.int64), "shape"),
    ]
    tokens, out = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 5, w]) for n, w in (("tokens", 4), ("out", 3))
    )
    graph = helper.make_graph(nodes, "vit", [tokens], [out], weights)
    path = tmp_path / "vit.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path, weight, positions


def test_the_name_and_shape_of_a_linear_layer_are_restored(exported: tuple[Path, Tensor, Tensor]) -> None:
    path, weight, _ = exported
    weights = read_onnx_weights(path)
    assert torch.equal(weights["vit.layers.0.fc1.weight"], weight)
    assert torch.equal(weights["vit.layers.0.fc1.bias"], torch.ones(3))
    assert torch.equal(weights["vit.embeddings.cls_token"], torch.full((1, 1, 4), 2.0))


def test_a_position_embedding_in_two_parts_is_joined(exported: tuple[Path, Tensor, Tensor]) -> None:
    path, _, positions = exported
    assert torch.equal(read_onnx_weights(path)["vit.embeddings.position_embeddings"], positions)


def test_a_file_that_is_not_an_onnx_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(UnreadableCheckpointError, match=r"broken\.onnx: not a readable ONNX graph"):
        read_onnx_weights(tmp_path / "broken.onnx")
    with pytest.raises(UnreadableCheckpointError, match="absent: no such file"):
        read_onnx_weights(tmp_path / "absent")
