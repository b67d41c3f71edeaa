"""The client of a request, and when the request arrived."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request

from service.domain import ApiKey
from service.http.keys import key_of
from service.http.protocol import ARRIVED_AT


@dataclass(frozen=True, slots=True)
class Caller:
    """The client of a request.

    Attributes:
        address: its address; None where unknown.
        key: its API key; None where none is required.
        arrived_at: when the first byte of the request arrived, in seconds on the monotonic clock.
    """

    address: str | None
    key: ApiKey | None
    arrived_at: float


def caller_of(request: Request, clock: Callable[[], float] = time.monotonic) -> Caller:
    """Return the client of a request; where no protocol of ours recorded its arrival, it arrives now by `clock`."""
    address = request.client.host if request.client else None
    return Caller(address, key_of(request.scope), request.scope.get(ARRIVED_AT) or clock())
