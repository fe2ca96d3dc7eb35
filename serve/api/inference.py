"""InferenceService: generation, streamed or whole, scores, embeddings, and the tokenizer. Only maps messages to and
from the types of serve/prepare."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import grpc

from isthmus.errors import InvalidRequest
from isthmus.proto_scores import EMBED_FIELDS, SCORE_FIELDS
from isthmus.scores import EmbedQuestion, ScoreQuestion
from isthmus.serve.api.errors import abort, status_of
from isthmus.serve.api.mapping import (
    choice,
    embed_question_of,
    embedding,
    finished,
    in_api_words,
    logprobs,
    question_of,
    score,
    score_question_of,
    started,
)
from isthmus.serve.api.session import Session
from isthmus.serve.engine.messages import End, Request
from isthmus.serve.prepare.choices import Choices
from isthmus.serve.prepare.delivery import LoopStream
from isthmus.serve.prepare.request import Preparation, detokenized, tokenized
from isthmus.serve.prepare.scores import embed_request, embedding_of, score_requests, scores_of
from isthmus.types import Completion, Delta
from isthmus.v1 import inference_pb2 as pb
from isthmus.v1 import inference_pb2_grpc

MOST_AT_ONCE = 512
"""Most tokens that are decoded in a row, for a client that reads slowly; it takes about 3 ms"""


class Asking(NamedTuple):
    """What requests are made with."""

    preparation: Preparation
    tenant: str
    deadline: float | None
    """On the clock of time.perf_counter"""


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, session: Session) -> None:
        self._session = session

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        async with self._generating(request, context) as asked:
            whole: dict[int, Completion] = {}
            async for delta in self._deltas(request, asked):
                if delta.completion is not None:
                    whole[delta.index] = delta.completion
            ids, cached = request.output.token_ids, self._session.report_cached
            return pb.GenerateResponse(
                request_id=asked[0].id,
                seed=asked[0].sampling.seed,
                choices=[
                    choice(index, whole[index], with_ids=ids, report_cached=cached) for index in range(len(asked))
                ],
                prompt_logprobs=logprobs(whole[0].prompt_logprobs),
            )

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext) -> None:
        message = request.request
        async with self._generating(message, context) as asked:
            await context.write(pb.GenerateStreamResponse(started=started(asked[0])))
            async for delta in self._deltas(message, asked):
                if delta.prompt_logprobs is not None:
                    await context.write(pb.GenerateStreamResponse(prompt_logprobs=logprobs(delta.prompt_logprobs)))
                ids = delta.token_ids if message.output.token_ids else ()
                if delta.text or ids or delta.logprobs:
                    told = pb.Delta(
                        choice_index=delta.index, text=delta.text, token_ids=ids, logprobs=logprobs(delta.logprobs)
                    )
                    await context.write(pb.GenerateStreamResponse(delta=told))
                if delta.completion is not None:
                    end = finished(delta.index, delta.completion, report_cached=self._session.report_cached)
                    await context.write(pb.GenerateStreamResponse(finished=end))

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext) -> pb.ScoreResponse:
        questions: list[ScoreQuestion] = []

        def prepare(asking: Asking) -> list[Request]:
            questions.append(score_question_of(request))
            return score_requests(asking.preparation, questions[0], tenant=asking.tenant, deadline=asking.deadline)

        def in_words(error: InvalidRequest) -> InvalidRequest:
            return in_api_words(error, request.prompt, SCORE_FIELDS)

        size = request.ByteSize()
        # The prompt is encoded with each continuation, which takes long even of a short message.
        async with self._submitted(context, [request.prompt], size, prepare, in_words, program=True) as asked:
            ends, report_cached = await self._ends(asked), self._session.report_cached

            def answer() -> pb.ScoreResponse:
                told = [score(each, report_cached=report_cached) for each in scores_of(asked, ends, questions[0])]
                return pb.ScoreResponse(request_id=asked[0].id, scores=told)

            # Of many tokens it takes seconds, in which all streams would stand still.
            return await asyncio.to_thread(answer)

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        questions: list[EmbedQuestion] = []

        def prepare(asking: Asking) -> list[Request]:
            asking.preparation.check_count("inputs", len(request.inputs))
            requests: list[Request] = []
            for index, prompt in enumerate(request.inputs):
                try:
                    questions.append(embed_question_of(request, prompt))
                    made = embed_request(
                        asking.preparation, questions[-1], tenant=asking.tenant, deadline=asking.deadline
                    )
                except InvalidRequest as error:
                    raise in_api_words(error, prompt, EMBED_FIELDS, f"inputs[{index}]") from None
                requests.append(dataclasses.replace(made, id=requests[0].id if requests else made.id))
            return requests

        async with self._submitted(context, request.inputs, request.ByteSize(), prepare) as asked:
            ends, report_cached = await self._ends(asked), self._session.report_cached

            def answer() -> pb.EmbedResponse:
                made = [embedding_of(*each) for each in zip(asked, ends, questions, strict=True)]
                told = [embedding(each, report_cached=report_cached) for each in made]
                return pb.EmbedResponse(request_id=asked[0].id, embeddings=told)

            return await asyncio.to_thread(answer)

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

    def _generating(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AbstractAsyncContextManager[list[Request]]:
        def prepare(asking: Asking) -> list[Request]:
            return asking.preparation.requests(question_of(message), tenant=asking.tenant, deadline=asking.deadline)

        def in_words(error: InvalidRequest) -> InvalidRequest:
            return in_api_words(error, message.prompt)

        program = message.HasField("response_format")
        return self._submitted(context, [message.prompt], message.ByteSize(), prepare, in_words, program=program)

    @asynccontextmanager
    async def _submitted(
        self,
        context: grpc.aio.ServicerContext,
        prompts: Sequence[pb.Prompt],
        size: int,
        prepare: Callable[[Asking], list[Request]],
        in_words: Callable[[InvalidRequest], InvalidRequest] = lambda error: error,
        *,
        program: bool = False,
    ) -> AsyncIterator[list[Request]]:
        """Yields a call's requests in the engine, which have one LoopStream as their reply_to. Cancels those that
        haven't ended when the call does.

        prepare: makes them, on another thread if they take long. size: bytes that are to be encoded. in_words: makes
        errors name the message's fields. program: whether more runs than an encoder; a grammar and a chat template are
        programs, of which even a short one may take a second.
        """
        engine = await self._session.ready_engine(context)
        left = context.time_remaining()
        deadline = None if left is None else time.perf_counter() + left
        asking = Asking(self._session.preparation(engine), self._session.tenant(context), deadline)
        program = program or any(prompt.HasField("messages") for prompt in prompts)
        truncated = any(prompt.HasField("truncate_prompt_tokens") for prompt in prompts)
        workers = self._session.tokenizing if truncated else self._session.workers
        try:
            prepared = await workers.run(size, lambda: prepare(asking), always=program)
            async with self._session.submitted(prepared) as asked:
                yield asked
        except InvalidRequest as error:
            await abort(context, status_of(in_words(error)))

    async def _ends(self, asked: Sequence[Request]) -> list[End]:
        """Waits for the end of each request."""
        events, ends = asked[0].reply_to, dict[Request, End]()
        assert isinstance(events, LoopStream)
        while len(ends) < len(asked):
            ends |= {event.request: event.end for event in await events.some(MOST_AT_ONCE) if event.end is not None}
        return [ends[request] for request in asked]

    async def _deltas(self, message: pb.GenerateRequest, asked: Sequence[Request]) -> AsyncIterator[Delta]:
        """Yields what the engine gives, several steps at once if the client is slow."""
        with_text = message.output.text if message.output.HasField("text") else True
        engine, events = self._session.engine, asked[0].reply_to
        assert isinstance(events, LoopStream) and engine is not None
        choices = Choices(self._session.model.tokenizer, asked, engine.cancel, with_text=with_text)
        while not choices.ended:
            for delta in choices.take(await events.some(MOST_AT_ONCE)):
                yield delta
