"""What every service of a server shares, between the event loop and the engine thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

import grpc
from google.rpc import code_pb2

from isthmus.errors import DuplicateRequest, Unavailable
from isthmus.model.weights.folder import ModelFolder
from isthmus.serve.api.adapter_root import AdapterRoot
from isthmus.serve.api.auth import tenant_of
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.errors import abort, retry_later
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.messages import Request
from isthmus.serve.prepare.delivery import LoopStream
from isthmus.serve.prepare.request import Preparation
from isthmus.serve.prepare.workers import Workers

RETRY_SECONDS = 1.0
"""Seconds that a request waits for a call with its id to end: a client that has given that up may ask again before its
cancellation is heard"""


class Session:
    """The model being served, and the engine once it is ready."""

    def __init__(self, model: ModelFolder, config: ServeConfig) -> None:
        self.model = model
        self.engine: Engine | None = None
        self._preparation: Preparation | None = None
        self.workers = Workers()
        """Threads that parse messages and tokenize prompts"""
        self.tokenizing = Workers()
        """Threads for Tokenize and Detokenize, and for prompts that are truncated: their texts may be longer than what
        a context holds, and mustn't hold other prompts up"""
        self.loading = Workers()
        """Threads that load the model, and adapters"""
        self.adapter_root = None if config.adapter_root is None else AdapterRoot(config.adapter_root)
        """Where clients may load adapters from; None lets nobody"""
        self._answering: dict[Request, asyncio.Event] = {}
        """By the first request of each call whose requests the engine has taken, until it has ended, which sets it"""
        self.closing = asyncio.Event()
        """Set when the server ends"""
        self.report_cached = config.report_cached_tokens
        self.needs_token = False
        """Whether calls need an auth token, which then says who calls"""
        self._stall_seconds = config.stall_seconds

    @property
    def stalled(self) -> bool:
        """Whether a step of the engine has taken longer than stall_seconds."""
        return self.engine is not None and self.engine.busy_seconds > self._stall_seconds

    def tenant(self, context: grpc.aio.ServicerContext) -> str:
        """Who calls. Without auth all are one: whatever a call says of itself then, anybody could say."""
        return tenant_of(context) if self.needs_token else ""

    def close(self) -> None:
        """Stops the threads, and what watches the server; calls that wait end as UNAVAILABLE."""
        self.closing.set()
        self.workers.close()
        self.tokenizing.close()
        self.loading.close()

    async def ready_engine(self, context: grpc.aio.ServicerContext) -> Engine:
        """The engine. Ends the call as UNAVAILABLE while the model is loading."""
        if self.engine is None:
            await abort(context, retry_later(code_pb2.UNAVAILABLE, "the model is still loading"))
        return self.engine

    def preparation(self, engine: Engine) -> Preparation:
        """What makes requests for the engine: one for all calls, because it keeps compiled grammars."""
        if self._preparation is None:
            self._preparation = Preparation.of(self.model, engine)
        return self._preparation

    @property
    def answering(self) -> int:
        """Calls whose requests the engine has taken and whose last message isn't sent yet."""
        return len(self._answering)

    @contextlib.asynccontextmanager
    async def submitted(self, requests: Sequence[Request]) -> AsyncIterator[list[Request]]:
        """Hands a call's requests to the engine, which must be ready, and yields them with one LoopStream as their
        reply_to; cancels them in the end. Used on the event loop. Raises RequestError if they aren't taken."""
        engine = self.engine
        assert engine is not None
        events = LoopStream()
        asked = [dataclasses.replace(request, reply_to=events) for request in requests]
        first = asked[0]
        if self.stalled:
            raise Unavailable(f"the engine's step has taken {engine.busy_seconds:.0f} s and hasn't ended")
        try:
            engine.submit(*asked)
        except DuplicateRequest:
            await self._earlier_call(first.id)
            engine.submit(*asked)
        ended = self._answering[first] = asyncio.Event()
        try:
            yield asked
        finally:
            for request in asked:
                engine.cancel(request)
            del self._answering[first]
            ended.set()

    async def _earlier_call(self, request_id: str) -> None:
        """Waits until calls with this id have ended, if they do soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_SECONDS):
                for ended in [ended for request, ended in self._answering.items() if request.id == request_id]:
                    await ended.wait()
