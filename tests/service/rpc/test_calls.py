import asyncio

import pytest

from service.errors import ClientGoneError, InvalidParameterError
from service.rpc import open_inference_pb2 as pb
from service.rpc.calls import CallsInFlight, CancellationWatch, address_of, parse_message

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:50000", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", "fe80::1%eth0"),
        ("unix:/run/socket", None),
        ("unknown", None),
    ],
)
def test_the_address_of_a_client_is_extracted_from_its_peer_name(peer: str, address: str | None) -> None:
    assert address_of(peer) == address


def test_a_message_with_too_many_fields_is_refused_before_it_is_parsed() -> None:
    request = pb.ModelInferRequest(inputs=[pb.ModelInferRequest.InferInputTensor()] * 2000)
    with pytest.raises(InvalidParameterError, match="the message has more than 1024 fields"):
        parse_message(request.SerializeToString(), pb.ModelInferRequest)


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x01\xff"])  # the second one has a text that is not UTF-8
def test_bytes_that_are_no_message_are_an_invalid_parameter(data: bytes) -> None:
    with pytest.raises(InvalidParameterError, match="the message is not a valid ModelInferRequest"):
        parse_message(data, pb.ModelInferRequest)


async def test_the_cancellation_of_a_call_raises_client_gone() -> None:
    async def answer() -> None:
        with CancellationWatch():
            await asyncio.Event().wait()

    answering = asyncio.create_task(answer())
    await asyncio.sleep(0)
    answering.cancel()
    with pytest.raises(ClientGoneError):
        await answering


async def test_the_cancellation_of_a_part_of_a_call_does_not_raise_client_gone() -> None:
    watch = CancellationWatch()

    async def answer_part() -> None:
        with watch:
            await asyncio.Event().wait()

    part = asyncio.create_task(answer_part())
    await asyncio.sleep(0)
    part.cancel()
    with pytest.raises(asyncio.CancelledError):
        await part


async def test_none_left_waits_until_the_last_call_has_ended() -> None:
    calls = CallsInFlight()
    with calls.counting():
        with calls.counting():
            waiting = asyncio.create_task(calls.none_left())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
