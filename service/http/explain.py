"""POST /explain: a classification, and the patches that the sub-network kept for it."""

from contextlib import ExitStack
from dataclasses import replace

from fastapi import Request, Response

from service.errors import InvalidParameterError
from service.http.classify import Handle, read_upload, respond
from service.http.context import RouteContext
from service.http.descriptions import describe_explanation
from service.http.disconnects import ClientWatch
from service.http.keys import key_of
from service.telemetry.logs import REQUEST_ID
from service.telemetry.outcomes import counted


def make_explain(context: RouteContext) -> Handle:
    """Create the handler of POST /explain."""

    async def explain(request: Request) -> Response:
        """Classify an image as POST /classify does, and return the patches that each pruning block kept.

        The server explains one image at a time, when nothing else needs the cores: use this for inspection, not in
        production.
        """
        watch = ClientWatch(request)
        with ExitStack() as turn, context.failures.counting():
            data = b""
            with counted(context.metrics, key_of(request.scope)) as record:
                context.open_server().explainer.check_room()  # before reading a body in vain
                upload = await read_upload(context, request, watch)
                server = upload.server
                if len(upload.reads) > 1:
                    raise InvalidParameterError("only one image per request can be explained")

                async def read_and_enter(within_s: float) -> bytes:
                    nonlocal data
                    data = await upload.reads[0](within_s)
                    turn.enter_context(server.explainer.turn())  # only now: a slow upload must not block others
                    return data

                wanted = replace(upload.wanted, num_together=2)  # its key must have enough left for both runs
                classification = await server.pipeline.classify(read_and_enter, wanted, watch)
                record(classification)
                class_names = server.checkpoint.class_names
                context.answers.remember(REQUEST_ID.get(), wanted, classification, class_names)
            kept = await server.explainer.explain(data, classification.decision.profile, wanted)
        return respond(describe_explanation(classification, kept, server.checkpoint))

    return explain
