"""InferenceService: generation, streamed or whole, and the tokenizer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf import duration_pb2

from isthmus.v1 import inference_pb2 as pb
from isthmus.v1 import inference_pb2_grpc
from serve.api.errors import abort, cancelled, internal, invalid
from serve.api.session import Session
from serve.api.validation import build_request, check_token_ids, prompt_ids, text_ids
from serve.engine.request import FinishReason, InvalidRequest, Output, Request

T = TypeVar("T")

OFF_LOOP_BYTES = 8 << 10
"""A longer text is tokenized on another thread, so that it delays nobody's stream."""

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
        try:
            ids = await _off_loop(len(request.text), text_ids, request, self._session.model.tokenizer)
        except InvalidRequest as error:
            await abort(context, invalid(error.field, error.message))
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        tokenizer = self._session.model.tokenizer
        try:
            ids = check_token_ids("token_ids", request.token_ids, tokenizer.vocab_size)
        except InvalidRequest as error:
            await abort(context, invalid(error.field, error.message))
        return pb.DetokenizeResponse(text=await _off_loop(len(ids), tokenizer.decode, ids))

    @asynccontextmanager
    async def _submitted(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tuple[Request, asyncio.Queue[Output]]]:
        """The request in the engine, and its outputs. A call that ends before its request cancels it."""
        engine = await self._session.ready_engine(context)
        tokenizer = self._session.model.tokenizer
        try:
            # A chat template is a program: it may take a second over a short text.
            size = math.inf if message.HasField("messages") else message.ByteSize()
            prompt = await _off_loop(size, prompt_ids, message, tokenizer, self._session.model.chat)
            model = self._session.model
            ours = build_request(message, prompt, tokenizer, engine.config.context_length, model.generation)
        except InvalidRequest as error:
            await abort(context, invalid(error.field, error.message))
        queue = await self._session.submit(ours, context)
        try:
            yield ours, queue
        finally:
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
            while not queue.empty():
                outputs.append(queue.get_nowait())
            last = outputs[-1]
            ended = last.finish_reason is not None
            if last.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
                await self._abort(last.finish_reason, context)
            stops = last.finish_reason in (FinishReason.EOS, FinishReason.STOP_TOKEN)
            ids = [output.token for output in outputs if output.token is not None]
            ids = ids[:-1] if stops else ids
            text = stream.push(ids) if with_text else ""
            if ended and with_text:
                text += stream.flush()
            yield Piece(ids, text, _finished(ours) if ended else None)

    async def _abort(self, reason: FinishReason, context: grpc.aio.ServicerContext) -> None:
        engine = self._session.engine
        if reason is FinishReason.CANCELLED:
            await abort(context, cancelled())
        if engine is None or engine.error is not None:
            await abort(context, internal("ENGINE_DEAD", "the engine has ended on an error"))
        await abort(
            context,
            internal("NON_FINITE_LOGITS", "the model gave logits that are not finite for this request"),
        )


async def _off_loop(size: float, work: Callable[..., T], *args: Any) -> T:
    """work(*args), on another thread when `size` bytes or items make it long."""
    return work(*args) if size <= OFF_LOOP_BYTES else await asyncio.to_thread(work, *args)


def _started(request: Request) -> pb.Started:
    return pb.Started(request_id=request.id, prompt_tokens=len(request.prompt), seed=request.sampling.seed)


def _duration(seconds: float) -> duration_pb2.Duration:
    nanos = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def _finished(request: Request) -> pb.Finished:
    assert request.finish_reason is not None and request.finished_at is not None
    first = request.first_token_at or request.finished_at
    return pb.Finished(
        finish_reason=_REASONS[request.finish_reason],
        stop_token_id=request.stop_token,
        usage=pb.Usage(
            prompt_tokens=len(request.prompt),
            cached_prompt_tokens=request.cached_tokens,
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
