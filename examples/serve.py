"""A server that answers requests while its weights are loaded in the background.

    python examples/serve.py PATH --port 8000

``GET /health`` is always answered with 200. ``GET /ready`` is answered with 503 and the progress until all weights are
loaded, and then with 200; with 500 and the reason if the load has failed. Stopping the server stops the load.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import asyncshard

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    sys.exit(f"{error.name} is not installed: pip install 'asyncshard[serve]'")

logger = logging.getLogger("uvicorn.error")


class Model:
    """Stands for your model: put your own class here."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}

    async def place(self, name: str, tensor: Any) -> None:
        """Copy a tensor, off the event loop. Its buffer then goes back to the memory budget."""
        self.weights[name] = await asyncio.to_thread(tensor.copy)


def create_app(model: Model, path: str, memory_budget_mb: float) -> Starlette:
    loader = asyncshard.AsyncShardLoader(memory_budget_mb=memory_budget_mb)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.stream = loader.stream(path)
        app.state.load = asyncio.create_task(load(model, app.state.stream))
        try:
            yield
        finally:
            app.state.load.cancel()
            await asyncio.gather(app.state.load, return_exceptions=True)

    return Starlette(routes=[Route("/health", health), Route("/ready", ready)], lifespan=lifespan)


async def load(model: Model, stream: asyncshard.Stream) -> None:
    try:
        async with stream:
            async for name, tensor in stream:
                await model.place(name, tensor)
    except Exception as error:
        logger.error("the weights could not be loaded: %s", error)
        raise
    logger.info("the weights are in after %.1f s", stream.statistics().elapsed_s)


async def health(request: Request) -> Response:
    return PlainTextResponse("ok")


async def ready(request: Request) -> Response:
    task, stream = request.app.state.load, request.app.state.stream
    if task.done() and task.exception() is not None:
        return JSONResponse({"error": str(task.exception())}, status_code=500)
    return JSONResponse(asdict(stream.statistics()), status_code=200 if task.done() else 503)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model whose weights are loaded in the background.")
    parser.add_argument("path", help="a directory of shards, or one .safetensors file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--memory-budget-mb", type=float, default=256)
    arguments = parser.parse_args()
    # After an orderly shutdown, uvicorn raises the signal again. By default that would kill the process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = create_app(Model(), arguments.path, arguments.memory_budget_mb)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, loop="uvloop")


if __name__ == "__main__":
    main()
