"""The weights inside an ONNX graph that PyTorch exported, by their names in PyTorch."""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from models.files.checkpoint_errors import UnreadableCheckpointError

NAMELESS = "onnx::"  # prefix that PyTorch's exporter gives to constants computed during the export


def read_onnx_weights(path: Path) -> dict[str, Tensor]:
    """Read every named weight, and the nameless ones whose names follow from where they are used.

    The exporter transposes the matrices of linear layers, which loses their names; the product that uses a matrix is
    named after its layer. A position embedding that was resampled during the export is left as two nameless constants,
    the class token's row and the patches' rows.

    Returns:
        float32 tensors by name, matrices of linear layers as (out, in).

    Raises:
        UnreadableCheckpointError: the file does not exist or is not an ONNX graph that can be read.
    """
    import openvino as ov  # type: ignore[import-untyped]

    if not path.is_file():
        raise UnreadableCheckpointError(f"{path}: no such file")
    try:
        graph = ov.Core().read_model(path)  # kept in a variable: otherwise its nodes lose their users
    except RuntimeError as error:
        raise UnreadableCheckpointError(f"{path}: not a readable ONNX graph") from error
    weights: dict[str, Tensor] = {}
    positions: dict[int, Tensor] = {}
    for constant in (node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant"):
        name, shape = constant.get_friendly_name(), tuple(constant.get_output_shape(0))
        users = [target.get_node().get_friendly_name() for target in constant.output(0).get_target_inputs()]
        if name.startswith(NAMELESS) and len(shape) == 2 and users:
            weights[f"{_module_of(users[0])}.weight"] = _tensor(constant).T.contiguous()
        elif name.startswith(NAMELESS) and len(shape) == 3 and math.isqrt(shape[1]) ** 2 == shape[1]:
            positions[shape[1]] = _tensor(constant)
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+|\w*_(token|embed)", name):
            weights[name] = _tensor(constant)
    prefix = next((name.removesuffix("cls_token") for name in weights if name.endswith("cls_token")), None)
    if prefix is not None and len(positions) == 2 and 1 in positions:
        name = "position_embeddings" if prefix.endswith("embeddings.") else "pos_embed"
        weights[prefix + name] = torch.cat([positions[1], positions[max(positions)]], dim=1)
    return weights


def _module_of(node: str) -> str:
    """Turn "/encoder/layers/layers.0/fc1/MatMul" into "encoder.layers.0.fc1"."""
    parts = node.strip("/").split("/")[:-1]
    return ".".join(
        part for part, following in zip(parts, [*parts[1:], ""], strict=True) if not following.startswith(f"{part}.")
    )


def _tensor(constant: object) -> Tensor:
    return torch.from_numpy(constant.data.copy()).float()  # type: ignore[attr-defined] # openvino's
