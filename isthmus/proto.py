"""Converts between the library's own types and the messages and statuses of isthmus.v1."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar, cast

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from isthmus.errors import (
    Cancelled,
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestError,
    RequestFailed,
    Unauthenticated,
    Unavailable,
)
from isthmus.forms import Choices, Grammar, JsonObject, JsonSchema, Regex, ResponseFormat, check_string
from isthmus.types import (
    Completion,
    Conversation,
    FinishReason,
    Question,
    SamplingParams,
    Service,
    TextPrompt,
    TokenLogprobs,
    TokenPrompt,
    check_cache,
    check_sized,
    check_stops,
    check_turn,
)
from isthmus.v1 import inference_pb2

T = TypeVar("T")

SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
"""The numbers that both SamplingParams have under one name"""
PROMPT_ARGUMENTS = {
    "messages": "prompt.messages.messages",
    "chat_template": "prompt.messages",
    "template_arguments": "prompt.messages.template_arguments_json",
    "parse_special": "prompt.parse_special",
    "truncate_prompt_tokens": "prompt.truncate_prompt_tokens",
}
"""The library's arguments for a prompt, and the fields of a request with a Prompt; `prompt` is as PROMPT_FIELDS say"""
SERVICE_ARGUMENTS = {
    "priority": "scheduling.priority",
    "max_queue_time": "scheduling.max_queue_time",
    "cache": "prefix_cache",
    "cache_salt": "prefix_cache.salt",
}
"""The same for how a request is served"""
API_FIELDS = {
    **PROMPT_ARGUMENTS,
    **SERVICE_ARGUMENTS,
    **{name: f"sampling.{name}" for name in SCALARS},
    "logit_bias": "sampling.logit_bias",
    "allowed_token_ids": "sampling.allowed_token_ids.ids",
    "bad_token_ids": "sampling.bad_token_ids",
    "min_tokens": "stop.min_tokens",
    "max_tokens": "stop.max_tokens",
    "stop_token_ids": "stop.token_ids",
    "stop": "stop.strings",
    "include_stop": "stop.include_stop",
    "logprobs": "output.logprobs",
    "prompt_logprobs": "output.prompt_logprobs",
    "n": "sampling.n",
    "json": "response_format.json_object",
    "schema": "response_format.json_schema",
    "regex": "response_format.regex",
    "grammar": "response_format.lark_grammar",
    "choices": "response_format.choices.texts",
    "skip_special_tokens": "output.keep_special_tokens",
}
"""The library's arguments, and the fields of a GenerateRequest for them. All others but `prompt` have the same name"""
PROMPT_FIELDS = {"text": "prompt.text", "token_ids": "prompt.token_ids.ids", "messages": "prompt.messages.messages"}
"""The kinds of prompt in a GenerateRequest, and the field of each that the library's `prompt` stands for"""
_DETAILS = "grpc-status-details-bin"


def rename(field: str, names: Mapping[str, str]) -> str:
    """A field such as `prompt[2]` or `messages[1].role`, with its first part renamed as `names` maps it."""
    for name in sorted(names, key=len, reverse=True):
        if field == name or field.startswith((f"{name}[", f"{name}.")):
            return names[name] + field[len(name) :]
    return field


# Questions and answers


def message_of(question: Question, *, token_ids: bool = True) -> inference_pb2.GenerateRequest:
    """The message for a question. token_ids: whether the response is to hold them. Raises InvalidRequest for a value
    that the message can't hold."""
    message = inference_pb2.GenerateRequest(request_id=question.request_id)
    set_prompt(message.prompt, question.prompt, question.sampling.truncate_prompt_tokens)
    _set_sampling(message, question.sampling)
    _set_format(message, question.sampling.response_format)
    set_service(message, question.service)
    if question.service.predicted_text:
        message.predicted_text = check_string("predicted_text", question.service.predicted_text)
    message.output.token_ids = token_ids
    return message


def set_prompt(
    message: inference_pb2.Prompt, prompt: TextPrompt | TokenPrompt | Conversation, last: int | None
) -> None:
    """Writes a prompt. last: how many of its last tokens to keep. Raises InvalidRequest."""
    match prompt:
        case TextPrompt(text, parse_special):
            message.text = check_string("prompt", text)
            fitting("parse_special", lambda: setattr(message, "parse_special", parse_special))
        case Conversation(messages, arguments):
            turns = [check_turn(index, turn) for index, turn in enumerate(messages)]
            fitting("messages", lambda: message.messages.messages.extend(inference_pb2.ChatMessage(**t) for t in turns))
            message.messages.SetInParent()
            if arguments:
                written = _json(arguments)
                fitting("template_arguments", lambda: setattr(message.messages, "template_arguments_json", written))
        case TokenPrompt(given):
            ids = check_sized("prompt", given)
            message.token_ids.SetInParent()
            fitting("prompt", lambda: message.token_ids.ids.extend(ids))
    if last is not None:
        fitting("truncate_prompt_tokens", lambda: setattr(message, "truncate_prompt_tokens", last))


def _set_sampling(message: inference_pb2.GenerateRequest, sampling: SamplingParams) -> None:
    for name in SCALARS:
        if (value := getattr(sampling, name)) is not None:
            fitting(name, partial(setattr, message.sampling, name, value))
    if sampling.max_tokens is not None:
        fitting("max_tokens", lambda: setattr(message.stop, "max_tokens", sampling.max_tokens))
    if sampling.logprobs is not None:
        fitting("logprobs", lambda: setattr(message.output, "logprobs", sampling.logprobs))
    if sampling.min_tokens is not None:
        fitting("min_tokens", lambda: setattr(message.stop, "min_tokens", sampling.min_tokens))
    if (allowed := sampling.allowed_token_ids) is not None:
        message.sampling.allowed_token_ids.SetInParent()
        ids = check_sized("allowed_token_ids", allowed)
        fitting("allowed_token_ids", lambda: message.sampling.allowed_token_ids.ids.extend(ids))
    before = check_sized("resume_token_ids", sampling.resume_token_ids)
    fitting("resume_token_ids", lambda: message.resume_token_ids.extend(before))
    bad = check_sized("bad_token_ids", sampling.bad_token_ids)
    fitting("bad_token_ids", lambda: message.sampling.bad_token_ids.extend(bad))
    fitting("logit_bias", lambda: message.sampling.logit_bias.update(sampling.logit_bias))
    if sampling.n != 1:
        fitting("n", lambda: setattr(message.sampling, "n", sampling.n))
    if sampling.prompt_logprobs is not None:
        fitting("prompt_logprobs", lambda: setattr(message.output, "prompt_logprobs", sampling.prompt_logprobs))
    skip = sampling.skip_special_tokens  # set as it is first, so that a value of a wrong type is refused
    fitting("skip_special_tokens", lambda: setattr(message.output, "keep_special_tokens", skip))
    message.output.keep_special_tokens = not skip
    stops = check_sized("stop_token_ids", sampling.stop_token_ids)
    fitting("stop_token_ids", lambda: message.stop.token_ids.extend(stops))
    message.stop.strings.extend(check_stops(sampling.stop))
    fitting("include_stop", lambda: setattr(message.stop, "include_stop", sampling.include_stop))
    fitting("ignore_eos", lambda: setattr(message.stop, "ignore_eos", sampling.ignore_eos))


def _set_format(message: inference_pb2.GenerateRequest, form: ResponseFormat | None) -> None:
    to = message.response_format
    match form:
        case None:
            message.ClearField("response_format")
        case JsonObject():
            to.json_object.SetInParent()
        case JsonSchema():
            to.json_schema = form.text()
        case Regex(pattern):
            to.regex = check_string("regex", pattern)
        case Grammar(lark):
            to.lark_grammar = check_string("grammar", lark)
        case Choices(texts):
            to.choices.SetInParent()
            if isinstance(texts, str):
                raise InvalidRequest("choices", "must be a list of texts, not a string")
            fitting("choices", lambda: to.choices.texts.extend(texts))
        case _:
            raise InvalidRequest("response_format", f"must be a form of text, not {type(form).__name__}")


def format_of(message: inference_pb2.GenerateRequest) -> ResponseFormat | None:
    """The form of text that a message asks for. Raises InvalidRequest if it names none."""
    given = message.response_format
    match given.WhichOneof("form"):
        case "json_object":
            return JsonObject()
        case "json_schema":
            return JsonSchema(given.json_schema)
        case "regex":
            return Regex(given.regex)
        case "lark_grammar":
            return Grammar(given.lark_grammar)
        case "choices":
            return Choices(list(given.choices.texts))
    if message.HasField("response_format"):
        raise InvalidRequest("response_format", "must have a form")
    return None


def set_service(
    message: inference_pb2.GenerateRequest | inference_pb2.ScoreRequest | inference_pb2.EmbedRequest, service: Service
) -> None:
    """Writes how a request is served, but for predicted_text. Raises InvalidRequest."""
    message.model = check_string("model", service.model)
    if service.priority != 0:
        fitting("priority", lambda: setattr(message.scheduling, "priority", service.priority))
    if (seconds := service.max_queue_time) is not None:
        fitting("max_queue_time", lambda: message.scheduling.max_queue_time.FromNanoseconds(round(1e9 * seconds)))
    if check_cache(service.cache) != "on":
        message.prefix_cache.bypass_read = service.cache not in ("on", "read")
        message.prefix_cache.bypass_write = service.cache not in ("on", "write")
    if service.cache_salt != "":
        message.prefix_cache.salt = check_string("cache_salt", service.cache_salt)


def fitting(field: str, put: Callable[[], T]) -> T:
    """Returns put(), which sets a field of a message. Raises InvalidRequest if the value doesn't fit."""
    try:
        return put()
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(field, str(error)) from None


def _json(arguments: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest("template_arguments", f"can't be sent as JSON: {error}") from None


def response_of(message: inference_pb2.GenerateResponse) -> Completion:
    """The completion that a response holds, with its alternatives. Raises RequestFailed if it holds none."""
    if not message.choices:
        raise RequestFailed("the server answered with no choice")
    prompt = logprobs_of(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None
    first, *others = [
        completion_of(
            message.seed,
            choice.text,
            tuple(choice.token_ids),
            choice.finished,
            logprobs_of(choice.logprobs) if choice.HasField("logprobs") else None,
            prompt,
        )
        for choice in message.choices
    ]
    return dataclasses.replace(first, alternatives=tuple(others)) if others else first


def logprobs_of(told: inference_pb2.Logprobs) -> tuple[TokenLogprobs, ...]:
    """What is told about tokens, one by one."""
    pairs = list(zip(told.top_token_ids, told.top, strict=True))
    each = len(pairs) // max(1, len(told.tokens))
    return tuple(
        TokenLogprobs(own, tuple(pairs[index * each : (index + 1) * each])) for index, own in enumerate(told.tokens)
    )


def completion_of(
    seed: int,
    text: str,
    token_ids: tuple[int, ...],
    finished: inference_pb2.Finished,
    logprobs: tuple[TokenLogprobs, ...] | None = None,
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None,
) -> Completion:
    """The completion that the parts of a response make up. seed: the first choice's."""
    usage, times = finished.usage, finished.timings
    return Completion(
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=FinishReason(finish_reason_name(finished.finish_reason)),
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        stop_string=finished.stop_string if finished.HasField("stop_string") else None,
        seed=(seed + finished.choice_index) % (1 << 64),
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        recomputed_tokens=usage.recomputed_tokens,
        preemptions=times.preemptions,
        queue_seconds=_seconds(times.queue),
        time_to_first_token=_seconds(times.time_to_first_token),
        total_seconds=_seconds(times.total),
        prompt_logprobs=prompt_logprobs if finished.choice_index == 0 else None,
    )


def finish_reason_name(reason: int) -> str:
    """The name that isthmus.types.FinishReason has for a value of the message's enum, such as EOS."""
    return str(inference_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_"))


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9


# Errors


def error_of(call: grpc.RpcError, fields: Mapping[str, str] = API_FIELDS) -> RequestError:
    """The exception for a call that failed. fields: the library's arguments, and the request's fields for them, which
    are renamed in the error."""
    code, message, status = call.code(), call.details() or "", _status(call)
    violations = _detail(status, error_details_pb2.BadRequest).field_violations
    field = violations[0].field if violations else ""
    if fields:
        prompt = fields.get("chat_template", "").removesuffix(".messages")
        ours = {theirs: name for name, theirs in fields.items()}
        field = rename(field, {**ours, f"{prompt}.text": "prompt", f"{prompt}.token_ids.ids": "prompt"})
    if violations:
        message = violations[0].description
    retry = _detail(status, error_details_pb2.RetryInfo)
    after = _seconds(retry.retry_delay) if retry.HasField("retry_delay") else None
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(field, message)
        case grpc.StatusCode.ALREADY_EXISTS:
            return DuplicateRequest(field, message)
        case grpc.StatusCode.NOT_FOUND if violations:
            return ModelNotFound(field, message)
        # gRPC's own limits, of a message and of metadata, which hold the token
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in message or "metadata size" in message:
            return InvalidRequest("", message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(message, after)
        case grpc.StatusCode.CANCELLED if "Channel closed" in message:  # by closing the client, here
            return Unavailable("this client was closed", None)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(message, after)
        case grpc.StatusCode.INTERNAL:
            return RequestFailed(message, _detail(status, error_details_pb2.ErrorInfo).reason)
        case _:
            return _PLAIN.get(code.name, RequestError)(message)


_PLAIN = {kind.code: kind for kind in (Cancelled, DeadlineExceeded, Unauthenticated)}


def _status(call: grpc.RpcError) -> status_pb2.Status:
    """The status that came with the google.rpc details of a call; an empty one if none did."""
    for key, value in cast(Iterable[tuple[str, bytes]], call.trailing_metadata() or ()):
        if key == _DETAILS:
            return status_pb2.Status.FromString(value)
    return status_pb2.Status()


def _detail(status: status_pb2.Status, kind: type[T]) -> T:
    """The detail of this kind; an empty one if there is none."""
    found = kind()
    for detail in status.details:
        if detail.Unpack(found):
            break
    return found
