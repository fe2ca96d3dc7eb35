"""InferenceService: generation, streamed or whole, and the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from google.protobuf import duration_pb2

from isthmus.serve.api.errors import abort, cancelled, closed, internal, status_of
from isthmus.serve.api.session import Session
from isthmus.serve.api.validation import build_request, detokenized, prompt_ids, tokenized
from isthmus.serve.engine.request import FinishReason, InvalidRequest, Output, Request
from isthmus.v1 import inference_pb2 as pb
from isthmus.v1 import inference_pb2_grpc

MOST_AT_ONCE = 512
"""Tokens that are decoded in a row, for a client that has read nothing for long: about 3 ms"""

_REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
}


@dataclass(frozen=True)
class Piece:
    """New tokens of a request, and its end if they are the last."""

    token_ids: list[int]
    text: str
    finished: pb.Finished | None


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, session: Session) -> None:
        self._session = session

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        async with self._submitted(request, context) as (ours, queue):
            response = pb.GenerateResponse(started=_started(ours))
            text = []
            async for piece in self._pieces(request, ours, queue, context):
                text.append(piece.text)
                if request.output.token_ids:
                    response.token_ids.extend(piece.token_ids)
                if piece.finished is not None:
                    response.finished.CopyFrom(piece.finished)
            response.text = "".join(text)
            return response

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext) -> None:
        message = request.request
        async with self._submitted(message, context) as (ours, queue):
            await context.write(pb.GenerateStreamResponse(started=_started(ours)))
            async for piece in self._pieces(message, ours, queue, context):
                if piece.text or (piece.token_ids and message.output.token_ids):
                    ids = piece.token_ids if message.output.token_ids else ()
                    await context.write(pb.GenerateStreamResponse(delta=pb.Delta(text=piece.text, token_ids=ids)))
                if piece.finished is not None:
                    await context.write(pb.GenerateStreamResponse(finished=piece.finished))

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        tokenizer, workers = self._session.model.tokenizer, self._session.tokenizing
        try:
            ids = await workers.run(request.ByteSize(), tokenized, request, tokenizer)
        except InvalidRequest as error:
            await abort(context, status_of(error))
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        tokenizer, workers = self._session.model.tokenizer, self._session.tokenizing
        try:
            text = await workers.run(request.ByteSize(), detokenized, request.token_ids, tokenizer)
        except InvalidRequest as error:
            await abort(context, status_of(error))
        return pb.DetokenizeResponse(text=text)

    @asynccontextmanager
    async def _submitted(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tuple[Request, asyncio.Queue[Output]]]:
        """The request in the engine, and its outputs. A call that ends before its request cancels it."""
        engine = await self._session.ready_engine(context)
        model, context_length = self._session.model, engine.config.context_length
        program = message.HasField("messages")  # a chat template: it may take a second over a short text
        try:
            prompt = await self._session.workers.run(
                message.ByteSize(), prompt_ids, message, model.tokenizer, model.chat, context_length, always=program
            )
            ours = build_request(message, prompt, model.tokenizer, context_length, model.generation)
        except InvalidRequest as error:
            await abort(context, status_of(error))
        queue = await self._session.submit(ours, context)
        self._session.answering += 1
        try:
            yield ours, queue
        finally:
            self._session.answering -= 1
            engine.cancel(ours)

    async def _pieces(
        self,
        message: pb.GenerateRequest,
        ours: Request,
        queue: asyncio.Queue[Output],
        context: grpc.aio.ServicerContext,
    ) -> AsyncGenerator[Piece, None]:
        """What the engine gives, several steps at once when the client is slow."""
        stream = self._session.model.tokenizer.stream(ours.prompt)
        with_text = message.output.text if message.output.HasField("text") else True
        ended = False
        while not ended:
            outputs = [await queue.get()]
            while not queue.empty() and len(outputs) < MOST_AT_ONCE:
                outputs.append(queue.get_nowait())
            last = outputs[-1]
            ended = last.finish_reason is not None
            if last.finish_reason in (FinishReason.CANCELLED, FinishReason.CLOSED, FinishReason.ERROR):
                await self._abort(last, context)
            stops = last.finish_reason in (FinishReason.EOS, FinishReason.STOP_TOKEN)
            ids = [output.token for output in outputs if output.token is not None]
            ids = ids[:-1] if stops else ids
            text = stream.push(ids) if with_text else ""
            if ended and with_text:
                text += stream.flush()
            finished = _finished(ours, report_cached=self._session.report_cached) if ended else None
            yield Piece(ids, text, finished)

    async def _abort(self, last: Output, context: grpc.aio.ServicerContext) -> None:
        engine = self._session.engine
        if last.finish_reason is FinishReason.CANCELLED:
            await abort(context, cancelled())
        if last.finish_reason is FinishReason.CLOSED:
            await abort(context, closed())
        if last.request.failure is not None:
            await abort(context, internal("REQUEST_FAILED", "the engine failed at this request; its log says how"))
        if engine is None or engine.error is not None:
            await abort(context, internal("ENGINE_DEAD", "the engine has ended on an error"))
        await abort(
            context,
            internal("NON_FINITE_LOGITS", "the model gave logits that are not finite for this request"),
        )


def _started(request: Request) -> pb.Started:
    return pb.Started(request_id=request.id, prompt_tokens=len(request.prompt), seed=request.sampling.seed)


def _duration(seconds: float) -> duration_pb2.Duration:
    nanos = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def _finished(request: Request, *, report_cached: bool) -> pb.Finished:
    assert request.finish_reason is not None and request.finished_at is not None
    first = request.first_token_at or request.finished_at
    return pb.Finished(
        finish_reason=_REASONS[request.finish_reason],
        stop_token_id=request.stop_token,
        usage=pb.Usage(
            prompt_tokens=len(request.prompt),
            cached_prompt_tokens=request.cached_tokens if report_cached else 0,
            completion_tokens=len(request.completion),
            recomputed_tokens=request.recomputed_tokens,
        ),
        timings=pb.Timings(
            queue=_duration((request.admitted_at or first) - request.arrival),
            time_to_first_token=_duration(first - request.arrival),
            total=_duration(request.finished_at - request.arrival),
            preemptions=request.preemptions,
        ),
    )
