"""Plain FastAPI: two processes, one image at a time."""

import asyncio
import sys

import uvicorn
from fastapi import FastAPI, Request

from tests.benchmarks.peers.model import Model


def make_app() -> FastAPI:
    """Make the app of one process."""
    model, app = Model(), FastAPI()

    @app.post("/classify")
    async def classify(request: Request) -> int:
        body = await request.body()
        (answer,) = await asyncio.to_thread(model, [body])
        return answer

    return app


if __name__ == "__main__":
    port = int(sys.argv[-1])
    uvicorn.run("tests.benchmarks.peers.fastapi_app:make_app", factory=True, workers=2, port=port, log_level="error")
