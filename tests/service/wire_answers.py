"""Answers as they are on the wire, for tests of clients."""

import json
from collections.abc import Mapping
from typing import Any

import httpx

ANSWER: dict[str, Any] = {
    "predictions": [{"label": "dalmatian", "index": 27, "probability": 0.99}],
    "subnetwork": {
        "patch_grid": 12,
        "patch_size_px": 18.7,
        "keep_rate": 0.7,
        "num_tokens": 145,
        "gflops": 2.193,
        "expected_accuracy": 0.958,
    },
    "looks": [{"patch_grid": 12, "keep_rate": 0.7, "gflops": 2.193, "confidence": 0.99, "inference_ms": 57.0}],
    "stopped": "sure",
    "gflops": 2.193,
    "decision": {"reason": "no other request is waiting", "batch_size": 1, "predicted_inference_ms": 57.9},
    "timing_ms": {"decode_wait": 0.4, "decode": 2.5, "queue": 1.0, "inference": 57.0, "total": 63.2},
    "budget_ms": 1000.0,
    "deadline_met": True,
    "model": {"name": "small", "version": "dd4a3765e8b7"},
}


def refusal(status: int, code: str, headers: Mapping[str, str] | None = None, **details: object) -> httpx.Response:
    """Return an error answer."""
    content = json_of({"error": {"code": code, "message": "it says so", "details": details}})
    return httpx.Response(status, content=content, headers=headers)


def json_of(value: object) -> bytes:
    """Write JSON as a foreign server might: NaN is written, although JSON does not have it."""
    return json.dumps(value).encode()
