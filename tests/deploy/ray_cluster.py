"""A Ray cluster of one node, started by the README's commands, and a load during which a replica is killed."""

import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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


def environment() -> dict[str, str]:
    """Read deploy/ray/environment as a shell would."""
    lines = shlex.split((FOLDER / "environment").read_text(), comments=True)
    return dict(line.split("=", 1) for line in lines)


def serve_config(port: int, replicas: int, **settings: object) -> dict[str, Any]:
    """Return the Serve config of the repository with this port, number of replicas and settings."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    config["http_options"] = {"port": port}
    (application,) = config["applications"]
    application["args"] |= settings
    application["deployments"][0]["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": replicas}
    return config


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray node that runs the app.

    Attributes:
        url: address of the app.
        node: process from which all others of the node descend.
    """

    url: str
    node: psutil.Process

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of the replicas that are ready."""
        found = []
        for process in self.node.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith("ray::ServeReplica:supervit"):
                    found.append(process)
        return found


@contextmanager
def ray_cluster(config: Mapping[str, Any], variables: Mapping[str, str], cpus: int = 2) -> Iterator[Cluster]:
    """Start a node, isolated from others on this machine, deploy a Serve config, and yield once all replicas run."""
    scripts = Path(sys.executable).parent
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SUPERVIT_"))}
    ports = dict(zip(("node", "client", "dashboard", "metrics", "stats"), free_ports(5), strict=True))
    apart = {
        "PATH": f"{scripts}:{known.get('PATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["metrics"]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports["stats"]),
    }
    dashboard = f"http://127.0.0.1:{ports['dashboard']}"
    options = {
        "port": ports["node"],
        "ray-client-server-port": ports["client"],
        "dashboard-port": ports["dashboard"],
        "num-cpus": cpus,
    }
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # short: holds sockets
        log, serve_config = Path(folder) / "log", Path(folder) / "serve.yaml"
        serve_config.write_text(yaml.safe_dump(dict(config)))
        start = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        environment = {**known, **apart, **variables}
        with log.open("wb") as output:
            node = subprocess.Popen(
                [scripts / start[0], *start[1:], f"--temp-dir={Path(folder, 'node')}"],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{config['http_options']['port']}"
        try:
            until(lambda: answers(f"{dashboard}/api/version"), log)
            subprocess.run(
                [scripts / "serve", "deploy", "--address", dashboard, serve_config], env=environment, check=True
            )
            until(lambda: all_run(dashboard, config), log)
            until(lambda: answers(f"{url}/health/ready"), log)
            yield Cluster(url, psutil.Process(node.pid))
        finally:
            with suppress(httpx.HTTPError):  # first: HAProxy outlives a node that is only terminated
                httpx.delete(f"{dashboard}/api/serve/applications/", timeout=START_LIMIT_S)
            node.terminate()
            node.wait(START_LIMIT_S)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(STATUS_INTERVAL_S)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def all_run(dashboard: str, config: Mapping[str, Any]) -> bool:
    """Return whether the application has its minimum number of replicas, and all of them run."""
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    status = httpx.get(f"{dashboard}/api/serve/applications/").json()["applications"].get(application["name"], {})
    known = status.get("deployments", {}).get(deployment["name"], {}).get("replicas", [])
    return [replica["state"] for replica in known] == ["RUNNING"] * deployment["autoscaling_config"]["min_replicas"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a request at the client.

    Attributes:
        number: number of the request.
        sent_s: time from the start of the load until the request was sent.
        latency_s: time until the answer had arrived or the connection had failed.
        status: HTTP status; None without an answer.
        request_ids: values of the X-Request-ID header of the answer.
        body: body of the answer.
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
    cluster: Cluster, images: Sequence[bytes], arrivals: Sequence[float], budget_ms: float, kill_at_s: float
) -> list[Answer]:
    """Send a request at each arrival time, however many still wait, and kill -9 one of the replicas at `kill_at_s`."""
    victim = cluster.replicas()[0]
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
                    f"{cluster.url}/classify?budget_ms={budget_ms:g}",
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
