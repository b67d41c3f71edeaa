"""Proves on a GPU what the tests show with fakes: `python -m tests.gpu.gpu_check --output gpu.json`.

Some minutes, no network. It prints a line for each check and writes all figures as JSON; the exit status is 1 if any
failed. Without a GPU (`--device cpu`), what needs one is reported as "not run".
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from models.checkpoint import load_checkpoint
from models.devices import resolve_device
from models.errors import DeviceError
from models.files.sources import shipped_names
from service.engines.torch_engine import TorchEngine
from tests.gpu.checks import (
    PHOTOGRAPHS,
    CheckFailedError,
    Found,
    Setting,
    check_alternation,
    check_ceiling,
    check_eager_speed,
    check_graph_speed,
    check_parity,
    check_readings,
    check_training,
    require,
)

START_LIMIT_S, ANSWER_LIMIT_S, END_LIMIT_S = 120.0, 10.0, 30.0
REQUESTS = 20


@dataclass(frozen=True, slots=True)
class Check:
    """A check, and whether it needs a GPU."""

    run: Callable[[Setting], Found]
    needs_gpu: bool


def check_server(setting: Setting) -> Found:
    """Start the real command, send requests to it, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    photo, name = next(PHOTOGRAPHS.glob("*.jpg")).read_bytes(), setting.checkpoints[0].name
    with tempfile.TemporaryDirectory() as folder:
        options = ["--checkpoint", name, "--engine", "torch", "--device", str(setting.device), "--port", str(port)]
        command = [sys.executable, "-m", "service.cli", "serve", *options, "--profile-folder", folder]
        server = subprocess.Popen(command, env=os.environ | {"SUPERVIT_LOG_LEVEL": "warning"})
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_LIMIT_S) as client:
                started_at = time.monotonic()
                _await_ready(client, server, started_at + START_LIMIT_S)
                ready_s = time.monotonic() - started_at
                answers = [client.post("/classify", content=photo).raise_for_status().json() for _ in range(REQUESTS)]
                engine = client.get("/subnetworks").json()["engine"]
                metrics = client.get("/metrics").text
            server.send_signal(signal.SIGTERM)
            ended = server.wait(END_LIMIT_S)
            require(ended == -signal.SIGTERM, f"the server ended with status {ended}")  # as uvicorn does after its work
        finally:
            server.kill()
            server.wait()
    samples = (line.split() for line in metrics.splitlines() if line.startswith("supervit_cuda_graph"))
    graphs = {name: float(value) for name, value in samples}
    require(all(answer["deadline_met"] for answer in answers), "an answer was late")
    if setting.device.type == "cuda":
        require("CUDA graphs" in engine and graphs["supervit_cuda_graphs"] > 0, f"no graphs: {engine}, {graphs}")
    return {"engine": engine, "ready_s": ready_s, "graphs": graphs, "timing_ms": answers[-1]["timing_ms"]}


def _await_ready(client: httpx.Client, server: subprocess.Popen[bytes], ends_at: float) -> None:
    while True:
        try:
            if client.get("/health/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # the server does not listen yet
        require(server.poll() is None, f"the server ended with status {server.returncode}")
        require(time.monotonic() < ends_at, "the server does not become ready")
        time.sleep(0.1)


CHECKS: Mapping[str, Check] = {
    "parity in float32": Check(partial(check_parity, precision="float32"), needs_gpu=False),
    "parity in bfloat16": Check(partial(check_parity, precision="bfloat16"), needs_gpu=True),
    "alternation without recapture": Check(check_alternation, needs_gpu=True),
    "speed of eager kernels": Check(check_eager_speed, needs_gpu=False),
    "speed of graphs": Check(check_graph_speed, needs_gpu=True),
    "readings of NVML": Check(check_readings, needs_gpu=True),
    "ceiling of utilization": Check(check_ceiling, needs_gpu=True),
    "training in bfloat16": Check(partial(check_training, dtype=torch.bfloat16), needs_gpu=False),
    "training in float16": Check(partial(check_training, dtype=torch.float16), needs_gpu=True),
    "server": Check(check_server, needs_gpu=False),
}


def run_checks(checks: Mapping[str, Check], setting: Setting) -> dict[str, dict[str, Any]]:
    """Run the checks one after the other, even after failures, and return the outcome of each."""
    outcomes = {}
    for name, check in checks.items():
        started_at = time.monotonic()
        outcome: dict[str, Any] = {"status": "passed"}
        if check.needs_gpu and setting.device.type != "cuda":
            outcome = {"status": "not run", "reason": "needs a GPU"}
        else:
            try:
                outcome["found"] = check.run(setting)
            except DeviceError as error:  # such as a GPU without bfloat16
                outcome = {"status": "not run", "reason": str(error)}
            except CheckFailedError as error:
                outcome = {"status": "failed", "reason": str(error)}
            except Exception:  # an unexpected error must not stop the other checks
                outcome = {"status": "failed", "reason": traceback.format_exc()}
        outcome["seconds"] = round(time.monotonic() - started_at, 1)
        outcomes[name] = outcome
        print(f"{name}: {outcome['status']}, {outcome['seconds']} s", outcome.get("reason", ""), flush=True)
    return outcomes


def describe_device(device: torch.device) -> dict[str, object]:
    """Describe the device and the software that the checks run on."""
    facts: dict[str, object] = {"device": str(device), "torch": torch.__version__, "platform": platform.platform()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        facts |= {"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call] # torch's
    return facts


def main(arguments: Sequence[str] | None = None, checks: Mapping[str, Check] = CHECKS) -> int:
    """Run the requested checks, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for what can be run without one")
    parser.add_argument("--checkpoints", nargs="+", default=sorted(shipped_names()), help="by default those that ship")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32], help="to time, ascending")
    parser.add_argument("--runs", type=int, default=30, help="of each batch that is timed")
    parser.add_argument("--checks", nargs="+", choices=checks, default=list(checks), metavar="NAME", help="some only")
    options = parser.parse_args(arguments)
    try:
        device = resolve_device(options.device)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    setting = Setting(
        device,
        tuple(map(load_checkpoint, options.checkpoints)),
        tuple(options.batch_sizes),
        options.runs,
        lambda model, precision: TorchEngine(model, str(device), threads, precision),
    )
    facts = describe_device(device)
    print(json.dumps(facts))
    outcomes = run_checks({name: checks[name] for name in options.checks}, setting)
    options.output.write_text(json.dumps({"device": facts, "checks": outcomes}, indent=1) + "\n")
    return int(any(outcome["status"] == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
