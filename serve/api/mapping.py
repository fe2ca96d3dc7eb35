"""Converts between the messages of isthmus.v1 and the types of serve/prepare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from google.protobuf import duration_pb2

from isthmus.errors import InvalidRequest
from isthmus.proto import API_FIELDS, PROMPT_FIELDS, SCALARS, format_of, rename
from isthmus.scores import Continuation, Embedding, EmbedQuestion, Pooling, Score, ScoreQuestion
from isthmus.serve.engine.messages import Request
from isthmus.types import (
    Cache,
    Completion,
    Conversation,
    Question,
    SamplingParams,
    Service,
    TextPrompt,
    TokenLogprobs,
    TokenPrompt,
)
from isthmus.v1 import inference_pb2 as pb

_POOLING: dict[int, Pooling] = {pb.POOLING_UNSPECIFIED: "mean", pb.POOLING_MEAN: "mean", pb.POOLING_LAST: "last"}
MAX_ARGUMENTS = 256 << 10
"""Most characters of a template's arguments, tools included"""


def question_of(message: pb.GenerateRequest) -> Question:
    """The question that a message asks. Raises InvalidRequest."""
    service = replace(_service(message), predicted_text=message.predicted_text)
    return Question(_prompt(message.prompt), _sampling(message), message.request_id, service)


def score_question_of(message: pb.ScoreRequest) -> ScoreQuestion:
    """The question that a message asks. Raises InvalidRequest."""
    return ScoreQuestion(
        _prompt(message.prompt),
        [_continuation(index, each) for index, each in enumerate(message.continuations)],
        message.logprobs if message.HasField("logprobs") else None,
        _last(message.prompt),
        message.request_id,
        _service(message),
    )


def _continuation(index: int, given: pb.Continuation) -> Continuation:
    kind = given.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest(f"continuations[{index}]", "give text or token_ids")
    return given.text if kind == "text" else list(given.token_ids.ids)


def embed_question_of(message: pb.EmbedRequest, given: pb.Prompt) -> EmbedQuestion:
    """The question that a message asks of one of its inputs. Raises InvalidRequest."""
    if message.pooling not in _POOLING:
        raise InvalidRequest("pooling", f"{message.pooling} is none that this server knows")
    return EmbedQuestion(
        _prompt(given),
        _POOLING[message.pooling],
        not message.keep_length,
        message.dimensions if message.HasField("dimensions") else None,
        _last(given),
        message.request_id,
        _service(message),
    )


def _prompt(given: pb.Prompt) -> TextPrompt | TokenPrompt | Conversation:
    kind = given.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("prompt", "give text, token_ids or messages")
    if given.parse_special and kind != "text":
        raise InvalidRequest("parse_special", f"is for text only: in {kind} a special token is always read as one")
    if kind == "text":
        return TextPrompt(given.text, given.parse_special)
    if kind == "token_ids":
        return TokenPrompt(given.token_ids.ids)
    turns = [{"role": turn.role, "content": turn.content} for turn in given.messages.messages]
    return Conversation(turns, _arguments(given.messages.template_arguments_json))


def _last(given: pb.Prompt) -> int | None:
    return given.truncate_prompt_tokens if given.HasField("truncate_prompt_tokens") else None


def _sampling(message: pb.GenerateRequest) -> SamplingParams:
    given, stop, output = message.sampling, message.stop, message.output
    return SamplingParams(
        **{name: getattr(given, name) for name in SCALARS if given.HasField(name)},
        logit_bias=dict(given.logit_bias),
        allowed_token_ids=given.allowed_token_ids.ids if given.HasField("allowed_token_ids") else None,
        bad_token_ids=given.bad_token_ids,
        resume_token_ids=message.resume_token_ids,
        min_tokens=stop.min_tokens if stop.HasField("min_tokens") else None,
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        stop_token_ids=stop.token_ids,
        stop=tuple(stop.strings),
        include_stop=stop.include_stop,
        skip_special_tokens=not output.keep_special_tokens,
        truncate_prompt_tokens=_last(message.prompt),
        n=given.n if given.HasField("n") else 1,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        ignore_eos=stop.ignore_eos,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        response_format=format_of(message),
    )


def _service(message: pb.GenerateRequest | pb.ScoreRequest | pb.EmbedRequest) -> Service:
    scheduling, cache = message.scheduling, message.prefix_cache
    uses: dict[tuple[bool, bool], Cache] = {
        (False, False): "on",
        (False, True): "read",
        (True, False): "write",
        (True, True): "off",
    }
    limit = scheduling.max_queue_time.ToNanoseconds() / 1e9 if scheduling.HasField("max_queue_time") else None
    return Service(
        priority=scheduling.priority,
        max_queue_time=limit,
        cache=uses[cache.bypass_read, cache.bypass_write],
        cache_salt=cache.salt,
        model=message.model,
    )


def _arguments(text: str) -> dict[str, Any]:
    """A template's arguments, from JSON. Raises InvalidRequest."""
    field = "template_arguments"
    if len(text) > MAX_ARGUMENTS:
        raise InvalidRequest(field, f"has {len(text)} characters; at most {MAX_ARGUMENTS}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            raise ValueError("an object has a key twice")
        return members

    def finite(name: str) -> None:
        raise ValueError(f"{name} is not a number in JSON")

    try:
        value = json.loads(text or "{}", object_pairs_hook=unique, parse_constant=finite)
    except RecursionError:
        raise InvalidRequest(field, "is nested too deep") from None
    except ValueError as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(field, "must be a JSON object")
    return value


def in_api_words(
    error: InvalidRequest, prompt: pb.Prompt, fields: Mapping[str, str] = API_FIELDS, place: str = "prompt"
) -> InvalidRequest:
    """The same error, naming the message's field for the library's argument. fields: as API_FIELDS. place: the field
    that has the prompt."""
    kind = PROMPT_FIELDS.get(prompt.WhichOneof("kind") or "", "prompt").replace("prompt", place, 1)
    return type(error)(rename(error.field, {**fields, "prompt": kind}), error.message)


def started(request: Request) -> pb.Started:
    return pb.Started(request_id=request.id, seed=request.sampling.seed, prompt_tokens=len(request.prompt))


def choice(index: int, completion: Completion, *, with_ids: bool, report_cached: bool) -> pb.Choice:
    """with_ids: whether it has the token ids. report_cached: whether it tells how much of the prompt was cached."""
    return pb.Choice(
        index=index,
        text=completion.text,
        token_ids=completion.token_ids if with_ids else (),
        logprobs=logprobs(completion.logprobs),
        finished=finished(index, completion, report_cached=report_cached),
    )


def logprobs(told: tuple[TokenLogprobs, ...] | None) -> pb.Logprobs | None:
    if told is None:
        return None
    top = [pair for each in told for pair in each.top]
    return pb.Logprobs(
        tokens=[each.logprob for each in told],
        top_token_ids=[token for token, _ in top],
        top=[logprob for _, logprob in top],
    )


def score(told: Score, *, report_cached: bool) -> pb.ContinuationScore:
    """report_cached: as in `choice`."""
    return pb.ContinuationScore(
        logprob=told.logprob,
        is_greedy=told.is_greedy,
        token_ids=told.token_ids,
        logprobs=logprobs(told.logprobs),
        usage=_usage(told, report_cached=report_cached),
    )


def embedding(made: Embedding, *, report_cached: bool) -> pb.Embedding:
    """report_cached: as in `choice`."""
    return pb.Embedding(values=made.values, usage=_usage(made, report_cached=report_cached))


def _usage(answer: Score | Embedding, *, report_cached: bool) -> pb.Usage:
    cached = answer.cached_prompt_tokens if report_cached else 0
    return pb.Usage(prompt_tokens=answer.prompt_tokens, cached_prompt_tokens=cached)


def finished(index: int, completion: Completion, *, report_cached: bool) -> pb.Finished:
    return pb.Finished(
        choice_index=index,
        finish_reason=f"FINISH_REASON_{completion.finish_reason}",
        stop_token_id=completion.stop_token_id,
        stop_string=completion.stop_string,
        usage=pb.Usage(
            prompt_tokens=completion.prompt_tokens,
            cached_prompt_tokens=completion.cached_prompt_tokens if report_cached else 0,
            completion_tokens=completion.completion_tokens,
            recomputed_tokens=completion.recomputed_tokens,
        ),
        timings=pb.Timings(
            queue=_duration(completion.queue_seconds),
            time_to_first_token=_duration(completion.time_to_first_token),
            total=_duration(completion.total_seconds),
            preemptions=completion.preemptions,
        ),
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    nanos = max(0, round(seconds * 1e9))
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)
