"""Metadata, configuration and statistics of the served model, as the protocol's JSON objects."""

from typing import Any

from models.checkpoint import Checkpoint
from service.domain import MAX_IMAGES
from service.inference_protocol.images import INPUT
from service.inference_protocol.outputs import LABELS, PROBABILITIES
from service.telemetry.inference_statistics import Duration, InferenceStatistics

PLATFORM = "supervit"
# The only version. Triton's versions are whole numbers, and perf_analyzer fails on any other.
VERSION = "1"


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the inputs and outputs; -1 is a dimension that the request decides."""
    num_classes = checkpoint.config.num_classes
    return {
        "name": checkpoint.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, num_classes]},
            {"name": LABELS, "datatype": "BYTES", "shape": [-1, -1]},
        ],
    }


def describe_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the model as Triton's model configuration does: its shapes omit the first dimension."""
    return {
        "name": checkpoint.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": MAX_IMAGES,
        "input": [{"name": INPUT, "data_type": "TYPE_STRING", "dims": [1]}],
        "output": [
            {"name": PROBABILITIES, "data_type": "TYPE_FP32", "dims": [checkpoint.config.num_classes]},
            {"name": LABELS, "data_type": "TYPE_STRING", "dims": [-1]},
        ],
        "dynamic_batching": {},
        "parameters": {"checkpoint_version": {"string_value": checkpoint.version}},
    }


def describe_statistics(checkpoint: Checkpoint, statistics: InferenceStatistics) -> dict[str, Any]:
    """Describe the statistics as Triton does."""
    return {
        "model_stats": [
            {
                "name": checkpoint.name,
                "version": VERSION,
                "last_inference": statistics.last_inference_ms,
                "inference_count": statistics.success.count,
                "execution_count": sum(batches.count for batches in statistics.by_batch_size.values()),
                "inference_stats": {
                    "success": _duration(statistics.success),
                    "fail": _duration(statistics.fail),
                    "queue": _duration(statistics.queue),
                    "compute_input": _duration(statistics.decode),
                    "compute_infer": _duration(statistics.inference),
                    "compute_output": _duration(Duration(statistics.success.count, 0.0)),
                },
                "batch_stats": [
                    {
                        "batch_size": size,
                        "compute_input": _duration(Duration(batches.count, 0.0)),
                        "compute_infer": _duration(batches),
                        "compute_output": _duration(Duration(batches.count, 0.0)),
                    }
                    for size, batches in sorted(statistics.by_batch_size.items())
                ],
            }
        ]
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": round(1e9 * duration.seconds)}
