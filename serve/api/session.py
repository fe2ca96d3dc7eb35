"""Between the event loop and the engine thread: what every service of a server shares."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from google.rpc import code_pb2

from isthmus.model.weights.folder import ModelFolder
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.errors import abort, retry_later, status_of
from isthmus.serve.api.workers import Workers
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.request import EngineError, InvalidRequest, Output, Request, Stalled


class Session:
    """The model being served, and the engine once it is ready. `sink` is the engine's way to the loop."""

    def __init__(self, model: ModelFolder, loop: asyncio.AbstractEventLoop, config: ServeConfig) -> None:
        self.model = model
        self.engine: Engine | None = None
        self.workers = Workers()
        """For prompts"""
        self.tokenizing = Workers()
        """For Tokenize and Detokenize, whose texts may be longer than any prompt and must not hold up those"""
        self.answering = 0
        """Calls whose request the engine has taken, until their last word is out"""
        self.report_cached = config.report_cached_tokens
        self._stall_seconds = config.stall_seconds
        self._loop = loop

    @property
    def stalled(self) -> bool:
        """Whether a step of the engine takes longer than one may."""
        return self.engine is not None and self.engine.busy_seconds > self._stall_seconds

    def close(self) -> None:
        """Takes no more texts; those that wait end as UNAVAILABLE."""
        self.workers.close()
        self.tokenizing.close()

    def sink(self, outputs: list[Output]) -> None:
        """Called on the engine thread; one wake-up of the loop a step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            output.request.handle.put_nowait(output)

    async def ready_engine(self, context: grpc.aio.ServicerContext) -> Engine:
        """The engine, or UNAVAILABLE while it loads."""
        if self.engine is None:
            await abort(context, retry_later(code_pb2.UNAVAILABLE, "the model is still loading"))
        return self.engine

    async def submit(self, request: Request, context: grpc.aio.ServicerContext) -> asyncio.Queue[Output]:
        """Hands a request to the engine; its outputs come through the queue. Ends the call if it isn't taken."""
        engine = await self.ready_engine(context)
        queue: asyncio.Queue[Output] = asyncio.Queue()
        request.handle = queue
        try:
            if self.stalled:
                raise Stalled(f"the engine's step has taken {engine.busy_seconds:.0f} s and hasn't ended")
            engine.submit(request)
        except (InvalidRequest, EngineError) as error:
            await abort(context, status_of(error))
        return queue
