"""The file of API keys: the hash of each key, and what the key allows. It is read again when it changes.

A key is random and long: its SHA-256 cannot be inverted, and a slow hash would protect it no better.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from service.access.watched_files import CHECK_S, ReloadedFiles
from service.domain import HIGHEST_PRIORITY, KEY_NAME, LOWEST_PRIORITY, ApiKey
from service.errors import UnauthorizedError, first_problem

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1_000_000
TOKEN_BYTES = 32
HEADERS = (b"authorization", b"x-api-key")


class _Entry(BaseModel):
    """The entry of a key in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=KEY_NAME)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    gflops_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    burst_gflops: float | None = Field(None, gt=0, allow_inf_nan=False)
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    highest_priority: int = Field(0, ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)
    shortest_budget_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_in_flight: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> "_Entry":
        if self.burst_gflops is not None and self.gflops_per_s is None:
            raise ValueError("burst_gflops requires gflops_per_s")
        return self

    def key(self) -> ApiKey:
        """Return what the key allows; the burst is one second of the rate by default."""
        burst = self.gflops_per_s if self.burst_gflops is None else self.burst_gflops
        return ApiKey(
            self.name,
            self.gflops_per_s,
            burst,
            self.weight,
            self.highest_priority,
            self.shortest_budget_ms,
            self.max_in_flight,
        )


class _Entries(BaseModel):
    """The file: a table `[[key]]` for each key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: tuple[_Entry, ...]

    @model_validator(mode="after")
    def _each_once(self) -> "_Entries":
        for what in ("name", "sha256"):
            if len({getattr(entry, what) for entry in self.key}) < len(self.key):
                raise ValueError(f"two keys have the same {what}")
        return self


@dataclass(frozen=True, slots=True)
class NewKey:
    """A new key: the secret for its holder, and the entry for the file."""

    secret: str
    entry: str


def make_key(name: str) -> NewKey:
    """Create a key with a random secret."""
    secret = secrets.token_urlsafe(TOKEN_BYTES)
    return NewKey(secret, f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n')


class KeyFile:
    """Looks up what a request's key allows in the current file."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            CommandError: the file cannot be read, or is no file of keys.
        """
        self._path = path
        self._file = ReloadedFiles([path], self._load, "keys", logger)

    def find(self, headers: Mapping[bytes, bytes]) -> ApiKey:
        """Return the key that came in `Authorization: Bearer` or `X-API-Key`.

        Args:
            headers: headers of the request, names in lower case.

        Raises:
            UnauthorizedError: the request has no key, or one that is not in the file.
        """
        secret = headers.get(HEADERS[1], b"")
        scheme, _, token = headers.get(HEADERS[0], b"").partition(b" ")
        if scheme.lower() == b"bearer":
            secret = token.strip()
        if not secret:
            raise UnauthorizedError("an API key is required; send it as `Authorization: Bearer KEY` or `X-API-Key`")
        digest, found = hashlib.sha256(secret).digest(), None
        for known, key in self._keys:  # all keys, each in constant time, against timing attacks
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise UnauthorizedError("unknown API key")
        return found

    async def watch(self) -> None:
        """Refresh the keys until cancelled, on another thread: thousands of them take a tenth of a second."""
        while True:
            await asyncio.sleep(CHECK_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file again if it has changed; keep the keys if it cannot be read, try again, and log that once."""
        self._file.refresh()

    def _load(self) -> str:
        self._keys = read_keys(self._path)
        return f"read {len(self._keys)} keys from {self._path}"


def read_keys(path: Path) -> tuple[tuple[bytes, ApiKey], ...]:
    """Read a file of keys.

    Returns:
        The SHA-256 of each key, and what the key allows.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no file of keys; the message says what is wrong with it.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"a key file may have at most {MAX_FILE_BYTES} bytes")
    try:
        entries = _Entries.model_validate(tomllib.loads(content.decode()))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except ValidationError as error:
        where, what = first_problem(error.errors(include_input=False))
        raise ValueError(f"{'.'.join(where)}: {what}" if where else what) from None
    return tuple((bytes.fromhex(entry.sha256), entry.key()) for entry in entries.key)
