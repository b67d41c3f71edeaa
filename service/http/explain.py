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
from service.telemetry.outcomes import counting_failures


def make_explain(context: RouteContext) -> Handle:
    """Create the handler of POST /explain."""

    async def explain(request: Request) -> Response:
        """Classify an image as POST /classify does, and return the patches that each pruning block kept.

        The server explains one image at a time, when nothing else needs the cores: use this for inspection, not in
        production.
        """
        watch = ClientWatch(request)
        with counting_failures(context.metrics, key_of(request.scope)):
            explainer = context.open_server().explainer
        explainer.check_room()  # before reading a body in vain; it is no request to classify yet, so it counts as none
        with counting_failures(context.metrics, key_of(request.scope)):
            upload = await read_upload(context, request, watch)
            if len(upload.reads) > 1:
                raise InvalidParameterError("only one image per request can be explained")
        server, data = upload.server, b""
        wanted = replace(upload.wanted, num_together=2)  # its key must have enough left for both runs
        with ExitStack() as turn, context.failures.counting():

            async def read_and_enter(within_s: float) -> bytes:
                nonlocal data
                data = await upload.reads[0](within_s)
                turn.enter_context(server.explainer.turn())  # only now: a slow upload must not block others
                return data

            classification = await context.classifier.classify(server.pipeline, read_and_enter, wanted, watch)
            kept = await server.explainer.explain(data, classification.decision.profile, wanted)
        return respond(describe_explanation(classification, kept, server.checkpoint))

    return explain
