"""Model changes of the real command under load: by an admin request, and by a change of the watched file."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.checkpoint import load_checkpoint, save_checkpoint
from models.files.sources import find_checkpoint
from models.header import Header
from tests.end_to_end.test_serving import (
    PHOTOGRAPH,
    SMALL_CHECKPOINT,
    free_port,
    one_measurement_for_all,
    picture,
    start,
    wait_until_ready,
)

__all__ = ["one_measurement_for_all"]
LIMIT_S = 180  # a candidate is compiled in the processor time that other tests leave
CLIENTS = 2
PAUSE_S = 0.1  # between two requests of a client
CHANGES = 2
TRIAL_S = 2.0
DRIP_BYTES, DRIP_S = 600, 0.4  # faster than 1000 bytes a second, below which the server drops an upload


@dataclass(frozen=True, slots=True)
class Served:
    """A server of a copy of the small checkpoint, and a checkpoint of the same weights with another name."""

    url: str
    port: int
    copy: Path
    other: Path

    def change(self) -> dict[str, Any] | None:
        change: dict[str, Any] | None = httpx.get(f"{self.url}/admin/model").json()["change"]
        return change

    def put(self, path: Path, **trials: dict[str, float]) -> None:
        response = httpx.put(f"{self.url}/admin/model", json={"checkpoint": str(path), **trials})
        assert response.status_code == 202, response.text

    def outcome(self, since: str = "") -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while (change := self.change()) is None or change["outcome"] is None or change["began_at"] <= since:
            assert time.monotonic() < deadline, change
            time.sleep(0.05)
        return change


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("change")
    copy, other, log, port = folder / "copy.safetensors", folder / "other.safetensors", folder / "log", free_port()
    shutil.copyfile(find_checkpoint(SMALL_CHECKPOINT), copy)
    loaded = load_checkpoint(copy)
    header = Header("other", loaded.config, loaded.class_names, loaded.profile, loaded.int8)
    save_checkpoint(other, loaded.model, header, half=loaded.is_half)
    process: subprocess.Popen[bytes] = start(port, log, "--checkpoint", str(copy), "--watch-checkpoint")
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        yield Served(url, port, copy, other)
    finally:
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM, log.read_text()
    assert "Traceback" not in log.read_text()


class Clients:
    """Clients that send requests until the block ends."""

    def __init__(self, url: str) -> None:
        self._url, self._is_over = url, threading.Event()
        self.answers: list[httpx.Response] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=LIMIT_S) as client:
            while not self._is_over.is_set():
                self.answers.append(client.post("/classify?budget_ms=20000", content=picture(number)))
                self._is_over.wait(PAUSE_S)

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def models(self) -> Counter[str]:
        return Counter(answer.json()["model"]["name"] for answer in self.answers)


def test_no_request_is_lost_while_the_model_changes_repeatedly(served: Served) -> None:
    with Clients(served.url) as clients:
        for number in range(CHANGES):
            served.put(served.copy if number % 2 else served.other)
            change = served.outcome()
            assert (change["outcome"], change["agreement"]) == ("done", 1.0), change
            assert change["num_compared"] > 0
    assert {answer.status_code for answer in clients.answers} == {200}
    assert set(clients.models()) == {SMALL_CHECKPOINT, "other"}
    page = httpx.get(f"{served.url}/metrics").text
    assert f'supervit_model_changes_total{{outcome="done"}} {float(CHANGES)}' in page


def test_a_canary_answers_its_share_of_requests_after_its_shadow_run(served: Served) -> None:
    name = httpx.get(f"{served.url}/admin/model").json()["model"]["name"]
    trial = {"share": 0.5, "seconds": TRIAL_S}
    with Clients(served.url) as clients:
        served.put(served.other if name == SMALL_CHECKPOINT else served.copy, shadow=trial, canary=trial)
        change = served.outcome()
    assert (change["outcome"], change["agreement"]) == ("done", 1.0), change
    assert {answer.status_code for answer in clients.answers} == {200}
    is_new = [answer.json()["model"]["name"] != name for answer in clients.answers]
    of_both = is_new[is_new.index(True) :]
    assert of_both.count(False) > CLIENTS  # an instant change could leave at most this many
    assert all(of_both[-CLIENTS:])


def test_the_old_model_answers_requests_whose_upload_began_before_the_change(served: Served) -> None:
    """The change ends only after these answers, although the new model answers all other requests."""
    image = PHOTOGRAPH.read_bytes() + bytes(25_000)  # ignored, but it makes the upload outlast the change
    size = len(image)
    head = f"POST /classify?budget_ms=29000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
    name = httpx.get(f"{served.url}/admin/model").json()["model"]["name"]
    with socket.create_connection(("127.0.0.1", served.port)) as late:
        late.sendall(head.encode())
        with Clients(served.url):
            served.put(served.other if name == SMALL_CHECKPOINT else served.copy)
            sent = 0
            while (change := served.change()) is not None and change["step"] != "retire":
                late.sendall(image[sent : sent + DRIP_BYTES])
                sent += DRIP_BYTES
                assert sent < size, change
                time.sleep(DRIP_S)
        assert httpx.get(f"{served.url}/admin/model").json()["model"]["name"] != name
        assert change is not None
        assert change["outcome"] is None
        late.sendall(image[sent:])
        late.settimeout(LIMIT_S)
        answer = b"".join(iter(lambda: late.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["model"]["name"] == name
    assert served.outcome()["outcome"] == "done"


def test_a_watched_checkpoint_is_served_once_its_file_is_complete(served: Served) -> None:
    change = served.change()
    before = "" if change is None else change["began_at"]
    whole = served.other.read_bytes()
    name = httpx.get(f"{served.url}/admin/model").json()["model"]["name"]
    replaced = served.copy.with_suffix(".new")
    with Clients(served.url) as clients:
        served.copy.write_bytes(whole[: len(whole) // 2])
        broken = served.outcome(since=before)
        assert (broken["outcome"], broken["step"]) == ("refused", "load")
        replaced.write_bytes(whole if name != "other" else find_checkpoint(SMALL_CHECKPOINT).read_bytes())
        os.replace(replaced, served.copy)
        fixed = served.outcome(since=broken["began_at"])
        assert (fixed["outcome"], fixed["name"]) == ("done", SMALL_CHECKPOINT if name == "other" else "other")
    assert {answer.status_code for answer in clients.answers} == {200}
