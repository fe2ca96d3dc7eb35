"""Converts between the library's own types and the messages and statuses of isthmus.v1."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from typing import TypeVar, cast

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from isthmus.arguments import (
    check_flag,
    check_int,
    check_number,
    check_whole,
    check_within,
    not_a_token,
    refused_ids,
)
from isthmus.errors import (
    Cancelled,
    DeadlineExceeded,
    DuplicateRequest,
    FailedPrecondition,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestError,
    RequestFailed,
    Unauthenticated,
    Unavailable,
)
from isthmus.forms import Choices, Grammar, JsonObject, JsonSchema, Regex, ResponseFormat, check_choices, check_string
from isthmus.types import (
    NO_LIMIT,
    Completion,
    Conversation,
    FinishReason,
    Question,
    SamplingParams,
    Service,
    TextPrompt,
    TokenLogprobs,
    TokenPrompt,
    check_bias,
    check_cache,
    check_priority,
    check_prompt,
    check_sized,
    check_stops,
    check_turns,
)
from isthmus.v1 import inference_pb2

T = TypeVar("T")

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
SCALARS = (*NUMBERS, "top_k", "seed")
"""The numbers that both SamplingParams have under one name"""
LOGPROBS = ("logprobs", "prompt_logprobs")
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
            message.parse_special = check_flag("parse_special", parse_special)
        case Conversation(messages, arguments):
            turns = check_turns(messages)
            message.messages.messages.extend(inference_pb2.ChatMessage(**turn) for turn in turns)
            message.messages.SetInParent()
            if arguments:
                message.messages.template_arguments_json = check_string("template_arguments", _json(arguments))
        case TokenPrompt(given):
            message.token_ids.SetInParent()
            set_ids("prompt", check_prompt(given), message.token_ids.ids)
    if last is not None:
        message.truncate_prompt_tokens = check_whole("truncate_prompt_tokens", last, 32)


def _set_sampling(message: inference_pb2.GenerateRequest, sampling: SamplingParams) -> None:
    to, stop, output = message.sampling, message.stop, message.output
    for name in NUMBERS:
        if (number := getattr(sampling, name)) is not None:
            setattr(to, name, check_number(name, number))
    for holder, names in ((to, ("top_k", "n")), (stop, ("max_tokens", "min_tokens")), (output, LOGPROBS)):
        for name in names:
            if (whole := getattr(sampling, name)) is not None:
                setattr(holder, name, check_whole(name, whole, 32))
    if sampling.seed is not None:
        to.seed = check_whole("seed", sampling.seed, 64)
    if (allowed := sampling.allowed_token_ids) is not None:
        to.allowed_token_ids.SetInParent()
        set_ids("allowed_token_ids", allowed, to.allowed_token_ids.ids)
    set_ids("resume_token_ids", sampling.resume_token_ids, message.resume_token_ids)
    set_ids("bad_token_ids", sampling.bad_token_ids, to.bad_token_ids)
    set_ids("stop_token_ids", sampling.stop_token_ids, stop.token_ids)
    _set_bias(to, sampling.logit_bias)
    output.keep_special_tokens = not check_flag("skip_special_tokens", sampling.skip_special_tokens)
    stop.strings.extend(check_stops(sampling.stop))
    stop.include_stop = check_flag("include_stop", sampling.include_stop)
    stop.ignore_eos = check_flag("ignore_eos", sampling.ignore_eos)


def _set_bias(message: inference_pb2.SamplingParams, given: Mapping[int, float]) -> None:
    for token, value in check_bias(given).items():
        if not 0 <= check_int("logit_bias", token) < 1 << 32:
            raise InvalidRequest(f"logit_bias[{token}]", not_a_token(token))
        message.logit_bias[token] = check_number(f"logit_bias[{token}]", value)


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
            to.choices.texts.extend(check_choices(texts))
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
        message.scheduling.priority = check_priority(service.priority)
    if (seconds := service.max_queue_time) is not None:
        checked = check_within("max_queue_time", seconds, 0, NO_LIMIT, open_low=True)
        message.scheduling.max_queue_time.FromNanoseconds(round(1e9 * checked))
    if check_cache(service.cache) != "on":
        message.prefix_cache.bypass_read = service.cache not in ("on", "read")
        message.prefix_cache.bypass_write = service.cache not in ("on", "write")
    if service.cache_salt != "":
        message.prefix_cache.salt = check_string("cache_salt", service.cache_salt)


def set_ids(field: str, given: Sequence[int], to: MutableSequence[int]) -> None:
    """Adds token ids to a field of a message. Raises InvalidRequest for what isn't a sequence of them."""
    ids = check_sized(field, given)
    try:
        to.extend(ids)
    except (ValueError, TypeError, OverflowError):
        raise refused_ids(field, ids, 32) from None


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


_HINTS = (
    ("UNAVAILABLE", "Hostname Verification Check failed", "the server's certificate doesn't name this host"),
    (
        "UNAVAILABLE",
        "CERTIFICATE_VERIFY_FAILED",
        "tls_ca (--tls-ca) isn't the authority of the server's certificate",
    ),
    ("UNAVAILABLE", "WRONG_VERSION_NUMBER", "does the server have TLS? it may not need tls_ca (--tls-ca)"),
    (
        "UNAVAILABLE",
        r"failed to connect.*(Socket closed|Connection reset)",
        "is it another program's port, or does it need tls_ca (--tls-ca)?",
    ),
    ("UNAVAILABLE", "", "is a server running there? isthmus serve --model DIR"),
    ("UNIMPLEMENTED", "", "is it another server's port?"),
)
"""What may be the matter if a call ends with a status, and words in its details, that no Isthmus server gave it: the
first that fits"""


def _hint(call: grpc.RpcError) -> str:
    """What may be the matter with a call, to be added to its details. An Isthmus server's statuses all have details in
    the call's trailing metadata, and need none."""
    if call.trailing_metadata():
        return ""
    name, details = call.code().name, call.details() or ""
    return next((f"; {hint}" for code, words, hint in _HINTS if code == name and re.search(words, details)), "")


def error_of(call: grpc.RpcError, fields: Mapping[str, str] = API_FIELDS, timeout: float | None = None) -> RequestError:
    """The exception for a call that failed. fields: the library's arguments, and the request's fields for them, which
    are renamed in the error. timeout: the call's, in seconds."""
    code, message, status = call.code(), (call.details() or "") + _hint(call), _status(call)
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
        case grpc.StatusCode.DEADLINE_EXCEEDED if timeout is not None and not call.trailing_metadata():
            return DeadlineExceeded.after(timeout)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(message, after)
        case grpc.StatusCode.INTERNAL:
            return RequestFailed(message, _detail(status, error_details_pb2.ErrorInfo).reason)
        case _:
            return _PLAIN.get(code.name, RequestError)(message)


_PLAIN = {kind.code: kind for kind in (Cancelled, DeadlineExceeded, FailedPrecondition, Unauthenticated)}


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
