"""The hub client against a server with the few routes of the hub; it runs in a fresh process, as it does for users."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[3]
COMMIT, OTHER_COMMIT, TOKEN = "a" * 40, "b" * 40, "hf_secret"
WEIGHTS = {
    COMMIT: {"model.safetensors": b"weights", "other.safetensors": b"no", "pytorch_model.bin": b"pickle"},
    OTHER_COMMIT: {"net.safetensors": b"other weights", "README.md": b"read"},
}
FIND = """
import sys
from models.files.checkpoint_errors import CheckpointError
from models.files.sources import find_checkpoint
for name in sys.argv[1:]:
    try:
        path = find_checkpoint(name)
        print(f"{path.name}: {path.read_text()}")
    except CheckpointError as error:
        print(error)
"""

LOAD = """
import sys
from models.checkpoint import load_checkpoint
from models.files.checkpoint_errors import CheckpointError
try:
    load_checkpoint(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@dataclass
class Repository:
    """A repository: its commits by revision, its files by commit, and whether it is private or gated."""

    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v2": OTHER_COMMIT})
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: WEIGHTS)
    is_private: bool = False
    is_gated: bool = False


class Hub(BaseHTTPRequestHandler):
    """Answers like huggingface.co: large files are redirected, private repositories are hidden without a token."""

    repositories: ClassVar[dict[str, Repository]] = {}
    requests: ClassVar[list[str]] = []
    status: ClassVar[int | None] = None

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        if self.status is not None:
            self.answer(self.status, b"<html>\n\x1b[31mno hub")
        elif self.path.startswith("/blobs/"):
            self.answer(HTTPStatus.OK, bytes.fromhex(self.path.rpartition("/")[2]))
        elif self.path.startswith("/api/models/"):
            name, _, revision = self.path.removeprefix("/api/models/").partition("/revision/")
            if commit := self.commit_of(name, unquote(revision)):
                siblings = [{"rfilename": file} for file in self.repositories[name].files[commit]]
                self.answer(HTTPStatus.OK, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        else:
            name, _, rest = self.path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            if commit := self.commit_of(name, unquote(revision)):
                data = self.repositories[name].files[commit][file]
                port = self.headers["Host"].rpartition(":")[2]
                headers = {
                    "X-Repo-Commit": commit,
                    "ETag": '"pointer"',
                    "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Linked-Size": str(len(data)),
                    "Location": f"http://localhost:{port}/blobs/{data.hex()}",
                }
                self.answer(HTTPStatus.FOUND, b"elsewhere", headers)

    do_HEAD = do_GET  # noqa: N815 - as the base class has it

    def commit_of(self, name: str, revision: str) -> str | None:
        """Return the commit of a revision; None after answering why there is none."""
        has_token = self.headers["Authorization"] == f"Bearer {TOKEN}"
        repository = self.repositories.get(name)
        if repository is None or (repository.is_private and not has_token):
            status = HTTPStatus.NOT_FOUND if has_token else HTTPStatus.UNAUTHORIZED
            self.answer(status, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not\nfound"})
        elif repository.is_gated:
            self.answer(HTTPStatus.FORBIDDEN, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision not in repository.revisions and revision not in repository.files:
            self.answer(HTTPStatus.NOT_FOUND, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository.revisions.get(revision, revision)
        return None

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value.replace("\n", " "))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


Find = Callable[..., list[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with one repository, the endpoint unless the test sets another HF_ENDPOINT."""
    monkeypatch.setattr(Hub, "repositories", {"owner/net": Repository()})
    monkeypatch.setattr(Hub, "requests", [])
    monkeypatch.setattr(Hub, "status", None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield Hub
        server.shutdown()
        thread.join()


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """Find checkpoints in a fresh process: find(name, ..., VARIABLE=value) returns the file or error of each."""

    def find(*names: str, script: str = FIND, **variables: str) -> list[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": os.environ["HF_ENDPOINT"],
            "HF_HOME": str(tmp_path / "home"),
            **variables,
        }
        command = [sys.executable, "-c", script, *names]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return find


def test_a_repository_gives_model_safetensors_or_its_only_safetensors_file(
    hub: type[Hub], find: Find, tmp_path: Path
) -> None:
    assert find("hf-hub:owner/net", "hf-hub:owner/net@v2", f"hf-hub:owner/net@{OTHER_COMMIT}") == [
        "model.safetensors: weights",
        "net.safetensors: other weights",
        "net.safetensors: other weights",
    ]
    assert "GET /api/models/owner/net/revision/main" in hub.requests
    snapshots = tmp_path / "home" / "hub" / "models--owner--net" / "snapshots"
    assert (snapshots / COMMIT / "model.safetensors").read_bytes() == b"weights"
    assert not list(tmp_path.rglob("pytorch_model.bin"))


def test_an_error_in_a_downloaded_file_names_the_requested_repository(hub: type[Hub], find: Find) -> None:
    hub.repositories["owner/net"] = Repository(files={COMMIT: {"model.safetensors": b""}})
    assert find("hf-hub:owner/net", script=LOAD) == ["hf-hub:owner/net: is empty"]


def test_a_cached_file_is_not_downloaded_again_and_is_found_without_a_network(hub: type[Hub], find: Find) -> None:
    names = ("hf-hub:owner/net", "hf-hub:owner/net@v2")
    found = find(*names)
    hub.requests.clear()
    assert find(*names) == found
    assert not [request for request in hub.requests if "/blobs/" in request]
    hub.requests.clear()
    assert find(*names, HF_HUB_OFFLINE="1") == found
    assert find(f"hf-hub:owner/net@{COMMIT}") == found[:1]
    assert hub.requests == []
    assert find(*names, HF_ENDPOINT="http://127.0.0.1:1") == found
    hub.status = HTTPStatus.BAD_GATEWAY
    assert find(*names) == found


def test_a_branch_that_moved_is_followed(hub: type[Hub], find: Find) -> None:
    assert find("hf-hub:owner/net") == ["model.safetensors: weights"]
    hub.repositories["owner/net"].revisions["main"] = OTHER_COMMIT
    assert find("hf-hub:owner/net") == ["net.safetensors: other weights"]


def test_a_private_repository_needs_a_token(hub: type[Hub], find: Find) -> None:
    hub.repositories["owner/private"] = Repository(is_private=True)
    name = "hf-hub:owner/private"
    (refused,) = find(name)
    assert refused == f"{name}: the repository does not exist or is private: set HF_TOKEN to a token that may read it"
    assert find(name, HF_TOKEN=TOKEN) == ["model.safetensors: weights"]


def test_a_repository_or_revision_that_cannot_be_used_is_a_one_line_error(hub: type[Hub], find: Find) -> None:
    several = {"b.safetensors": b"b", "a.safetensors": b"a"}
    hub.repositories |= {
        "owner/several": Repository(files={COMMIT: several, OTHER_COMMIT: {"model.bin": b"pickle"}}),
        "owner/gated": Repository(is_gated=True),
    }
    assert find("hf-hub:owner/none", HF_TOKEN=TOKEN) == [
        "hf-hub:owner/none: the repository does not exist, or the token may not read it"
    ]
    assert find(
        "hf-hub:owner/net@v3",
        "hf-hub:owner/several",
        "hf-hub:owner/several@v2",
        "hf-hub:owner/gated",
        "hf-hub:owner/a--b",
    ) == [
        "hf-hub:owner/net@v3: the repository has no revision v3",
        "hf-hub:owner/several: the repository holds several safetensors files, none named model.safetensors: "
        "a.safetensors, b.safetensors",
        "hf-hub:owner/several@v2: the repository holds no safetensors file",
        "hf-hub:owner/gated: the repository is gated: request access on its page, and set HF_TOKEN to a token of "
        "that account",
        "hf-hub:owner/a--b: not a valid repository name",
    ]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "nonsense"])
def test_an_unreachable_hub_is_a_one_line_error(hub: type[Hub], find: Find, endpoint: str) -> None:
    assert find("hf-hub:owner/net", HF_ENDPOINT=endpoint) == [
        "hf-hub:owner/net: the hub cannot be reached: no network, or a wrong HF_ENDPOINT"
    ]
    assert hub.requests == []


def test_no_request_is_sent_if_hf_hub_offline_is_set(hub: type[Hub], find: Find) -> None:
    assert find("hf-hub:owner/net", HF_HUB_OFFLINE="1") == [
        "hf-hub:owner/net: not in the cache, and HF_HUB_OFFLINE is set"
    ]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (HTTPStatus.INTERNAL_SERVER_ERROR, "the hub answered with status 500"),
        (HTTPStatus.FORBIDDEN, "the hub rejected the token: set HF_TOKEN to one that may read the repository"),
        (HTTPStatus.OK, "the server is not a Hugging Face hub; check HF_ENDPOINT"),
    ],
)
def test_an_unexpected_response_of_the_hub_is_a_one_line_error(
    hub: type[Hub], find: Find, status: int, problem: str
) -> None:
    hub.status = status
    assert find("hf-hub:owner/net") == [f"hf-hub:owner/net: {problem}"]


def test_a_cache_that_cannot_be_written_is_a_one_line_error(hub: type[Hub], find: Find, tmp_path: Path) -> None:
    assert hub.requests == []
    (tmp_path / "file").touch()
    (line,) = find("hf-hub:owner/net", HF_HOME=str(tmp_path / "file"))
    assert line == "hf-hub:owner/net: cannot be written to the cache: Not a directory"
