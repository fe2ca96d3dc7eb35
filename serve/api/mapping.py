"""Converts between the messages of isthmus.v1 and the types of serve/prepare."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import duration_pb2

from isthmus.errors import InvalidRequest
from isthmus.proto import API_FIELDS, PROMPT_FIELDS, SCALARS, format_of, rename
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

MAX_ARGUMENTS = 256 << 10
"""Most characters of a template's arguments, tools included"""


def question_of(message: pb.GenerateRequest) -> Question:
    """The question that a message asks. Raises InvalidRequest."""
    return Question(_prompt(message), _sampling(message), message.request_id, _service(message))


def _prompt(message: pb.GenerateRequest) -> TextPrompt | TokenPrompt | Conversation:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "give text, token_ids or messages")
    if message.parse_special and kind != "text":
        raise InvalidRequest("parse_special", f"is for text only: in {kind} a special token is always read as one")
    if kind == "text":
        return TextPrompt(message.text, message.parse_special)
    if kind == "token_ids":
        return TokenPrompt(message.token_ids.ids)
    turns = [{"role": turn.role, "content": turn.content} for turn in message.messages.messages]
    return Conversation(turns, _arguments(message.messages.template_arguments_json))


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
        truncate_prompt_tokens=(message.truncate_prompt_tokens if message.HasField("truncate_prompt_tokens") else None),
        ignore_eos=stop.ignore_eos,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        response_format=format_of(message),
    )


def _service(message: pb.GenerateRequest) -> Service:
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


def in_api_words(error: InvalidRequest, message: pb.GenerateRequest) -> InvalidRequest:
    """The same error, naming the message's field for the library's argument."""
    prompt = PROMPT_FIELDS.get(message.WhichOneof("prompt") or "", "prompt")
    return type(error)(rename(error.field, {**API_FIELDS, "prompt": prompt}), error.message)


def started(request: Request) -> pb.Started:
    return pb.Started(request_id=request.id, prompt_tokens=len(request.prompt), seed=request.sampling.seed)


def logprobs(told: tuple[TokenLogprobs, ...] | None) -> pb.Logprobs | None:
    if told is None:
        return None
    top = [pair for each in told for pair in each.top]
    return pb.Logprobs(
        tokens=[each.logprob for each in told],
        top_token_ids=[token for token, _ in top],
        top=[logprob for _, logprob in top],
    )


def finished(completion: Completion, *, report_cached: bool) -> pb.Finished:
    return pb.Finished(
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
