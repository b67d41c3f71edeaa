import hashlib
import logging
import os
from pathlib import Path

import pytest

from service.access.key_file import MAX_FILE_BYTES, KeyFile, make_key
from service.domain import ApiKey
from service.errors import CommandError, UnauthorizedError

SECRET = "a secret that is long enough"  # noqa: S105 - used by these tests only
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def entry(name: str = "camera", secret: str = SECRET, **limits: float) -> str:
    lines = [f"{limit} = {value}" for limit, value in limits.items()]
    return "\n".join(
        ["[[key]]", f'name = "{name}"', f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"', *lines, ""]
    )


def bearer(secret: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {secret}".encode()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(entry())
    return file


def replace_file(path: Path, content: str) -> None:
    """Rewrite a file as an editor does, and advance its modification time: the file system's clock may be coarse."""
    stamp = path.stat().st_mtime_ns
    path.write_text(content)
    os.utime(path, ns=(stamp + 1_000_000, stamp + 1_000_000))


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": f"Bearer {SECRET}".encode()},
        {b"authorization": f"bearer  {SECRET}".encode()},
        {b"x-api-key": SECRET.encode()},
        {b"authorization": b"Basic xyz", b"x-api-key": SECRET.encode()},
    ],
)
def test_a_key_is_read_from_a_bearer_token_or_from_x_api_key(path: Path, headers: dict[bytes, bytes]) -> None:
    assert KeyFile(path).find(headers) == ApiKey("camera")


@pytest.mark.parametrize("headers", [{}, {b"authorization": b"Bearer "}, {b"authorization": b"Basic abc"}])
def test_a_request_without_a_key_is_told_how_to_send_one(path: Path, headers: dict[bytes, bytes]) -> None:
    with pytest.raises(UnauthorizedError, match="Authorization: Bearer KEY"):
        KeyFile(path).find(headers)


def test_an_unknown_key_is_refused_and_not_repeated_in_the_error(path: Path) -> None:
    with pytest.raises(UnauthorizedError, match="unknown API key") as caught:
        KeyFile(path).find(bearer("another one"))
    assert "another one" not in caught.value.message


def test_the_hash_of_a_key_is_not_accepted_as_a_key(path: Path) -> None:
    with pytest.raises(UnauthorizedError):
        KeyFile(path).find(bearer(DIGEST))


def test_the_limits_of_a_key_are_read_from_the_file(path: Path) -> None:
    limits = {
        "gflops_per_s": 40.0,
        "burst_gflops": 120.0,
        "weight": 2.0,
        "highest_priority": -3,
        "shortest_budget_ms": 50.0,
        "max_in_flight": 64,
    }
    path.write_text(entry("camera", SECRET, **limits))
    assert KeyFile(path).find(bearer(SECRET)) == ApiKey("camera", **limits)  # type: ignore[arg-type] # each value has its parameter's type


def test_the_default_burst_of_a_rate_is_one_second_of_it(path: Path) -> None:
    path.write_text(entry(gflops_per_s=40.0))
    assert KeyFile(path).find(bearer(SECRET)).burst_gflops == 40.0


def test_a_changed_file_is_read_again_once_it_is_checked(path: Path) -> None:
    keys = KeyFile(path)
    replace_file(path, entry("phone", "another secret") + entry(weight=2.0))
    with pytest.raises(UnauthorizedError):
        keys.find(bearer("another secret"))
    keys.refresh()
    assert keys.find(bearer("another secret")).name == "phone"
    assert keys.find(bearer(SECRET)).weight == 2.0


@pytest.mark.parametrize(
    "content",
    ["[[key", "a = " + 100_000 * "[", "[[key]]\nname = 'x'\n", "[[key]]\nname = 'x'\nsha256 = 'abc'\n"],
    ids=["no TOML", "nested too deeply", "no hash", "a short hash"],
)
def test_a_broken_file_keeps_the_previous_keys_and_is_logged_once(
    path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeyFile(path)
    replace_file(path, content)
    for _ in range(3):
        keys.refresh()
        assert keys.find(bearer(SECRET)).name == "camera"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_missing_file_keeps_the_previous_keys_until_it_is_back(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = KeyFile(path)
    path.unlink()
    for _ in range(3):
        keys.refresh()
        assert keys.find(bearer(SECRET)).name == "camera"
    assert len(caplog.records) == 1
    path.write_text(entry("phone"))
    keys.refresh()
    assert keys.find(bearer(SECRET)).name == "phone"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[[key", "Expected"),
        ("", "key"),
        ("[[key]]\nname = 'x y'\nsha256 = '" + DIGEST + "'\n", "key.0.name"),
        (entry(gflops_per_s=-1), "key.0.gflops_per_s: must be greater than 0"),
        (entry(burst_gflops=1), "burst_gflops requires gflops_per_s"),
        (entry(highest_priority=11), "must be at most 10"),
        (entry(colour=1), "unknown parameter"),
        (entry() + entry("other"), "two keys have the same sha256"),
        (entry() + entry("camera", "other"), "two keys have the same name"),
        ("#" * (MAX_FILE_BYTES + 1), "at most 1000000 bytes"),
        ("[[key]]\nname = '\udcff'", "utf-8"),
    ],
)
def test_a_server_does_not_start_with_a_broken_key_file_and_names_the_fault(
    path: Path, content: str, problem: str
) -> None:
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CommandError, match=problem) as caught:
        KeyFile(path)
    assert DIGEST not in str(caught.value)


def test_a_server_does_not_start_without_its_key_file(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No such file"):
        KeyFile(tmp_path / "none.toml")


def test_generated_keys_work_and_differ(tmp_path: Path) -> None:
    first, second = make_key("first"), make_key("second")
    path = tmp_path / "keys.toml"
    path.write_text(first.entry + second.entry)
    keys = KeyFile(path)
    assert (keys.find(bearer(first.secret)).name, keys.find(bearer(second.secret)).name) == ("first", "second")
    assert first.secret not in first.entry
    assert first.secret != second.secret
