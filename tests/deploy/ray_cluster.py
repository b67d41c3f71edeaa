"""A Ray cluster of one node for tests and benchmarks, started by the README's commands, and the loss of a replica."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "ray"
START_LIMIT_S = 180.0
STATUS_INTERVAL_S = 0.5
ISOLATION = {"RAY_USAGE_STATS_ENABLED": "0"}  # tells nobody outside of it
DASHBOARD = "http://127.0.0.1:8265"


def environment() -> dict[str, str]:
    """Read deploy/ray/environment as a shell would."""
    lines = shlex.split((FOLDER / "environment").read_text(), comments=True)
    return dict(line.split("=", 1) for line in lines)


def serve_config(port: int, replicas: int, **settings: object) -> dict[str, Any]:
    """Take the Serve config of the repository, with so many replicas and these settings."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    config["http_options"] = {"port": port}
    (application,) = config["applications"]
    application["args"] |= settings
    application["deployments"][0]["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": replicas}
    return config


@contextmanager
def ray_cluster(config: Mapping[str, Any], variables: Mapping[str, str], cpus: int = 2) -> Iterator[str]:
    """Start a node and deploy a Serve config on it; yields the URL once all its replicas run.

    Another node on this machine is stopped first: Ray's commands know only one.
    """
    scripts = Path(sys.executable).parent
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SUPERVIT_"))}
    found = f"{scripts}:{known.get('PATH', '')}"

    def call(*command: str) -> str:
        done = subprocess.run(
            [scripts / command[0], *command[1:]],
            env={**known, "PATH": found, **ISOLATION, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=START_LIMIT_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # short: sockets lie below it
        path = Path(folder) / "serve.yaml"
        path.write_text(yaml.safe_dump(dict(config)))
        call("ray", "stop")
        try:
            call(
                "ray",
                "start",
                "--head",
                f"--num-cpus={cpus}",
                "--disable-usage-stats",
                f"--temp-dir={Path(folder, 'node')}",
            )
            call("serve", "deploy", str(path))
            url = f"http://127.0.0.1:{config['http_options']['port']}"
            wait_until_running(config)
            wait_until_ready(url)
            yield url
        finally:
            call("serve", "shutdown", "--yes")  # first: HAProxy would outlive a node that just ends
            call("ray", "stop")


def wait_until_running(config: Mapping[str, Any]) -> None:
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    wanted, deadline = deployment["autoscaling_config"]["min_replicas"], time.monotonic() + START_LIMIT_S
    while True:
        status = httpx.get(f"{DASHBOARD}/api/serve/applications/").json()["applications"].get(application["name"], {})
        known = status.get("deployments", {}).get(deployment["name"], {}).get("replicas", [])
        if [replica["state"] for replica in known] == ["RUNNING"] * wanted:
            return
        assert time.monotonic() < deadline, status
        time.sleep(STATUS_INTERVAL_S)


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while httpx.get(f"{url}/health/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(STATUS_INTERVAL_S)


def replicas() -> dict[int, psutil.Process]:
    """Find the processes of the replicas that are ready, by process id."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica:supervit"):
            found[process.pid] = process
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got for a request.

    Attributes:
        number: of the request.
        sent_s: when it was sent, from the start of the load.
        latency_s: until its answer had come, or the connection had failed.
        status: of HTTP; None where there was no answer.
        request_ids: the header that names the request that was answered.
        body: as sent.
    """

    number: int
    sent_s: float
    latency_s: float
    status: int | None
    request_ids: tuple[str, ...]
    body: bytes

    @property
    def expected_accuracy(self) -> float:
        return float(json.loads(self.body)["subnetwork"]["expected_accuracy"])


async def load_and_kill(
    url: str, images: Sequence[bytes], arrivals: Sequence[float], budget_ms: float, kill_at_s: float
) -> list[Answer]:
    """Send a request at each instant, however many still wait; kill -9 one of the replicas in the middle."""
    victim = next(iter(replicas().values()))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.monotonic()

        async def ask(number: int, at: float) -> Answer:
            await asyncio.sleep(began + at - time.monotonic())
            started = time.monotonic()

            def answer(status: int | None, request_ids: Sequence[str] = (), body: bytes = b"") -> Answer:
                ended = time.monotonic()
                return Answer(number, started - began, ended - started, status, tuple(request_ids), body)

            try:
                async with session.post(
                    f"{url}/classify?budget_ms={budget_ms:g}",
                    data=images[number % len(images)],
                    headers={"content-type": "image/jpeg", "x-request-id": f"request-{number}"},
                ) as response:
                    return answer(response.status, response.headers.getall("x-request-id", []), await response.read())
            except aiohttp.ClientError:
                return answer(None)

        async def kill() -> None:
            await asyncio.sleep(kill_at_s)
            victim.kill()

        killing = asyncio.create_task(kill())
        answers = await asyncio.gather(*(ask(number, at) for number, at in enumerate(arrivals)))
        await killing
    return answers
