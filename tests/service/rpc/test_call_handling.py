import logging

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message

from service.classifier import ClientLimiter
from service.rpc.call_handling import CallHandling, Messages
from service.rpc.calls import Call
from service.runtime import ServerRuntime
from service.telemetry.logs import TextFormatter
from tests.service.rpc.conftest import failure_of

pytestmark = pytest.mark.anyio


async def fail(_: Messages, __: Call) -> Message:
    raise RuntimeError("the secret of a bug")


async def test_a_bug_is_logged_and_not_shown_to_the_client(
    runtime: ServerRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setFormatter(TextFormatter())
    answering = CallHandling(runtime.inference_protocol, runtime.metrics, 30, 8, ClientLimiter(8))
    server = grpc.aio.server()
    handlers = {"Fail": answering.method("Fail", fail)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("of.Bugs", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/of.Bugs/Fail")
        status, message, metadata = await failure_of(ask(b"", metadata=(("x-request-id", "mine"),)))
    await server.stop(None)
    assert (status, metadata["error-code"]) == (grpc.StatusCode.INTERNAL, "internal_error")
    assert message == "internal server error; see the server's log"
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info
    assert "request_id=mine" in caplog.text
