"""One gRPC call, whatever it asks for: its request ID, its client, its message and its cancellation."""

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
from service.request_names import request_id_of
from service.rpc.wire_fields import MAX_FIELDS, count_fields

REQUEST_ID = "x-request-id"
NETWORKS = ("ipv4", "ipv6")
CANCELLING_S = 0.05  # for this long, a cancelled call may look like a call without a message

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of a call before its message has come.

    Attributes:
        request_id: the ID that the client gave, or one made for the call.
        address: address of the client; None if it is not known.
        metadata: text values by names in lower case; the last one of several values.
        arrived_at: when the call arrived, in seconds on the monotonic clock.
        time_left_s: time that the client waits from then on; None for no limit.
    """

    request_id: str
    address: str | None
    metadata: Mapping[str, str]
    arrived_at: float
    time_left_s: float | None

    @classmethod
    def of(cls, context: "ServicerContext[bytes, bytes]", arrived_at: float) -> "Call":
        """Read a call from its gRPC context."""
        metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = request_id_of(metadata.get(REQUEST_ID, "").encode()).decode()
        return cls(request_id, address_of(context.peer()), metadata, arrived_at, context.time_remaining())


def address_of(peer: str) -> str | None:
    """Extract the address from gRPC's name for a client, such as `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    kind, _, place = unquote(peer).partition(":")
    return place.rpartition(":")[0].strip("[]") if kind in NETWORKS else None


async def read_bytes(messages: AsyncIterator[bytes], within_s: float) -> bytes:
    """Wait for the only message of a call, and return its bytes.

    Raises:
        UploadTimeoutError: the message does not arrive in time.
        InvalidParameterError: the call ends without a message.
    """
    try:
        async with asyncio.timeout(within_s):
            data = await anext(messages, None)
    except TimeoutError as error:
        raise UploadTimeoutError(f"the message did not arrive within {within_s:g} s") from error
    if data is None:
        await asyncio.sleep(CANCELLING_S)
        raise InvalidParameterError("the call ended without a message")
    return data


async def read_message(messages: AsyncIterator[bytes], message_type: type[M], within_s: float) -> M:
    """Wait for the only message of a call, and parse it; errors as `read_bytes` and `parse_message`."""
    return parse_message(await read_bytes(messages, within_s), message_type)


def parse_message(data: bytes, message_type: type[M]) -> M:
    """Parse a message.

    Raises:
        InvalidParameterError: the bytes are no such message, or have more than MAX_FIELDS fields.
    """
    try:
        if count_fields(data, message_type) > MAX_FIELDS:
            raise InvalidParameterError(f"the message has more than {MAX_FIELDS} fields, nested ones included")
        return message_type.FromString(data)
    except (DecodeError, ValueError) as error:
        raise InvalidParameterError(f"the message is not a valid {message_type.DESCRIPTOR.name}") from error


class CancellationWatch:
    """Turns the cancellation of its blocks into a ClientGoneError, if the call was cancelled.

    gRPC cancels the task that answers a call once the client has cancelled the call, closed the connection, or waits no
    longer. Each image of a request has a block, maybe in a task of its own, which may be cancelled for other reasons.
    """

    def __init__(self) -> None:
        """Remember the current task as the one that answers the call."""
        self._answering = asyncio.current_task()

    def __enter__(self) -> None:
        """Begin a block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Replace the cancellation by the error that the pipeline knows.

        Raises:
            ClientGoneError: the block was cancelled with its call.
        """
        task = asyncio.current_task()
        is_over = self._answering is not None and self._answering.cancelling()
        if isinstance(error, asyncio.CancelledError) and is_over and task and not task.uncancel():
            raise ClientGoneError("the call was cancelled before the answer") from None


class CallsInFlight:
    """Counts the calls, or requests of a stream, that are being answered."""

    def __init__(self) -> None:
        """Start with none."""
        self._number = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count one more until the block ends."""
        self._number += 1
        self._none_left.clear()
        try:
            yield
        finally:
            self._number -= 1
            if not self._number:
                self._none_left.set()

    async def none_left(self) -> None:
        """Wait until none is being answered."""
        await self._none_left.wait()
