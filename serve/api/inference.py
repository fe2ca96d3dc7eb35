"""InferenceService: generation, streamed or whole, and the tokenizer. Only maps messages to and from the types
of serve/prepare."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from isthmus.errors import InvalidRequest
from isthmus.serve.api.errors import abort, status_of
from isthmus.serve.api.mapping import finished, in_api_words, logprobs, question_of, started
from isthmus.serve.api.session import Session
from isthmus.serve.engine.messages import Request
from isthmus.serve.prepare.answer import Answer
from isthmus.serve.prepare.delivery import LoopStream
from isthmus.serve.prepare.request import detokenized, tokenized
from isthmus.types import Delta
from isthmus.v1 import inference_pb2 as pb
from isthmus.v1 import inference_pb2_grpc

MOST_AT_ONCE = 512
"""Most tokens that are decoded in a row, for a client that reads slowly; it takes about 3 ms"""


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, session: Session) -> None:
        self._session = session

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        async with self._submitted(request, context) as ours:
            async for delta in self._deltas(request, ours):
                whole = delta.completion
            assert whole is not None
            return pb.GenerateResponse(
                started=started(ours),
                text=whole.text,
                token_ids=whole.token_ids if request.output.token_ids else (),
                finished=finished(whole, report_cached=self._session.report_cached),
                logprobs=logprobs(whole.logprobs),
            )

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext) -> None:
        message = request.request
        async with self._submitted(message, context) as ours:
            await context.write(pb.GenerateStreamResponse(started=started(ours)))
            async for delta in self._deltas(message, ours):
                ids = delta.token_ids if message.output.token_ids else ()
                if delta.text or ids or delta.logprobs:
                    told = pb.Delta(text=delta.text, token_ids=ids, logprobs=logprobs(delta.logprobs))
                    await context.write(pb.GenerateStreamResponse(delta=told))
                if delta.completion is not None:
                    end = finished(delta.completion, report_cached=self._session.report_cached)
                    await context.write(pb.GenerateStreamResponse(finished=end))

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        def work() -> list[int]:
            return tokenized(self._session.model.tokenizer, request.text, parse_special=request.parse_special)

        return pb.TokenizeResponse(token_ids=await self._session.tokenizing.run(request.ByteSize(), work))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        def work() -> str:
            return detokenized(self._session.model.tokenizer, request.token_ids)

        return pb.DetokenizeResponse(text=await self._session.tokenizing.run(request.ByteSize(), work))

    @asynccontextmanager
    async def _submitted(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Request]:
        """Yields the request in the engine, with a LoopStream as its reply_to. Cancels it if the call ends first."""
        engine = await self._session.ready_engine(context)
        preparation = self._session.preparation(engine)
        # A chat template and a grammar are programs: even a short one may take a second.
        program = message.HasField("messages") or message.HasField("response_format")
        workers = self._session.tokenizing if message.HasField("truncate_prompt_tokens") else self._session.workers
        left, tenant = context.time_remaining(), self._session.tenant(context)
        deadline = None if left is None else time.perf_counter() + left

        def prepare() -> Request:
            return preparation.request(question_of(message), tenant=tenant, deadline=deadline)

        try:
            prepared = await workers.run(message.ByteSize(), prepare, always=program)
            async with self._session.submitted(prepared) as ours:
                yield ours
        except InvalidRequest as error:
            await abort(context, status_of(in_api_words(error, message)))

    async def _deltas(self, message: pb.GenerateRequest, ours: Request) -> AsyncIterator[Delta]:
        """Yields what the engine gives, several steps at once if the client is slow."""
        with_text = message.output.text if message.output.HasField("text") else True
        answer, events = Answer(self._session.model.tokenizer, ours, with_text=with_text), ours.reply_to
        engine = self._session.engine
        assert isinstance(events, LoopStream) and engine is not None
        ended = False
        while not ended:
            delta = answer.take(await events.some(MOST_AT_ONCE))
            ended = delta.completion is not None
            if ended:  # by a stop string, which the engine doesn't know of
                engine.cancel(ours)
            yield delta
