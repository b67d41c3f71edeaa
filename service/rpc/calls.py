"""One call as gRPC brings it: its name, its client, its message and how it ends. What is asked is no matter of it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar
from urllib.parse import unquote

from google.protobuf.message import DecodeError, Message
from grpc.aio import ServicerContext

from service.errors import ClientGoneError, InvalidParameterError, UploadTimeoutError
from service.request_names import name_request
from service.rpc.wire_fields import MAX_FIELDS, count_fields

REQUEST_ID = "x-request-id"
NETWORKS = ("ipv4", "ipv6")
CANCELLING_S = 0.05  # for so long, a call that is cancelled may look like one without a message

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of a call before its message has come.

    Attributes:
        request_id: its own, or one made for it.
        address: that it came from; None where that is not known.
        metadata: names in lower case; of several values the last.
        arrived_at: in seconds, on the monotonic clock.
        time_left_s: that its client still waits then; None for as long as it takes.
    """

    request_id: str
    address: str | None
    metadata: Mapping[str, str]
    arrived_at: float
    time_left_s: float | None

    @classmethod
    def of(cls, context: "ServicerContext[bytes, bytes]", arrived_at: float) -> "Call":
        """Read what gRPC knows."""
        metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = name_request(metadata.get(REQUEST_ID, "").encode()).decode()
        return cls(request_id, address_of(context.peer()), metadata, arrived_at, context.time_remaining())


def address_of(peer: str) -> str | None:
    """Take the address out of gRPC's name for a client, such as `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    kind, _, place = unquote(peer).partition(":")
    return place.rpartition(":")[0].strip("[]") if kind in NETWORKS else None


async def read_bytes(messages: AsyncIterator[bytes], within_s: float) -> bytes:
    """Wait for the one message of a call, and leave it as it came.

    Raises:
        UploadTimeoutError: it does not arrive in time.
        InvalidParameterError: none comes.
    """
    try:
        async with asyncio.timeout(within_s):
            data = await anext(messages, None)
    except TimeoutError as error:
        raise UploadTimeoutError(f"the message did not arrive within {within_s:g} s") from error
    if data is None:
        await asyncio.sleep(CANCELLING_S)
        raise InvalidParameterError("the call ends without a message")
    return data


async def read_message(messages: AsyncIterator[bytes], message_type: type[M], within_s: float) -> M:
    """Wait for the one message of a call; errors as `read_bytes` and `parse_message`."""
    return parse_message(await read_bytes(messages, within_s), message_type)


def parse_message(data: bytes, message_type: type[M]) -> M:
    """Read a message from its bytes.

    Raises:
        InvalidParameterError: they are none, or have more than MAX_FIELDS fields.
    """
    try:
        if count_fields(data, message_type) > MAX_FIELDS:
            raise InvalidParameterError(f"the message has more than {MAX_FIELDS} fields, with those inside them")
        return message_type.FromString(data)
    except (DecodeError, ValueError) as error:
        raise InvalidParameterError(f"the message is no {message_type.DESCRIPTOR.name}") from error


class CancellationWatch:
    """Turns the cancelling of the blocks that it stands around into a ClientGoneError, where it is the call's end.

    gRPC cancels what answers a call once its client has cancelled it, has closed its connection, or waits no longer.
    There is a block for each image of a request, maybe in a task of its own, and others have reasons to cancel those.
    """

    def __init__(self) -> None:
        """Take note of the task that answers the call: this one."""
        self._answering = asyncio.current_task()

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say it in the pipeline's words.

        Raises:
            ClientGoneError: the block was cancelled with its call.
        """
        task = asyncio.current_task()
        is_over = self._answering is not None and self._answering.cancelling()
        if isinstance(error, asyncio.CancelledError) and is_over and task and not task.uncancel():
            raise ClientGoneError("the client left before its answer") from None


class CallsInFlight:
    """Counts the calls, or requests of a stream, that are being answered."""

    def __init__(self) -> None:
        """Start with none."""
        self._number = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count one until the block ends."""
        self._number += 1
        self._none_left.clear()
        try:
            yield
        finally:
            self._number -= 1
            if not self._number:
                self._none_left.set()

    async def none_left(self) -> None:
        """Wait until none is."""
        await self._none_left.wait()
