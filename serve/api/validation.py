"""From a GenerateRequest to the engine's Request: every field checked, in one place that every front end shares."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from isthmus.model.text.chat import ChatError, ChatTemplate
from isthmus.model.text.tokenizer import TextError, Tokenizer, TooManyTokens
from isthmus.model.weights.folder import GenerationDefaults
from isthmus.serve.engine.request import InvalidRequest, Request, SamplingParams
from isthmus.v1 import inference_pb2

DEFAULT_MAX_TOKENS = 256
MAX_REQUEST_ID = 128
"""Characters"""
MAX_STOP_TOKENS = 64
MAX_TEMPERATURE = 100.0
MAX_MESSAGES = 1024
MAX_ARGUMENTS = 256 << 10
"""Characters of a template's arguments, tools included"""


MAX_TOKENS = 1 << 18
"""Of one Tokenize or Detokenize: more would hold up everybody's streams while they become a list"""
MAX_CHARACTERS = 4_000_000
"""Of a text that is answered whole"""


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """Raises InvalidRequest naming the first id that the tokenizer doesn't have."""
    return _checked(field, ids, vocab_size).tolist()


def _checked(field: str, ids: Sequence[int], vocab_size: int) -> np.ndarray:
    values = np.array(ids, np.int64)
    wrong = np.flatnonzero(values >= vocab_size)
    if wrong.size:
        token = values[wrong[0]]
        raise InvalidRequest(f"{field}[{wrong[0]}]", f"{token} is not a token id; the vocabulary has {vocab_size}")
    return values


def tokenized(message: inference_pb2.TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """The ids of Tokenize. Raises InvalidRequest."""
    try:
        return tokenizer.encode(check_text("text", message.text), MAX_TOKENS, parse_special=message.parse_special)
    except TooManyTokens as error:
        raise InvalidRequest("text", f"{error} are told at once: split it") from None
    except TextError as error:
        raise InvalidRequest("text", str(error)) from None


def detokenized(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of Detokenize. Raises InvalidRequest."""
    if len(ids) > MAX_TOKENS:
        raise InvalidRequest("token_ids", f"has {len(ids)} ids; at most {MAX_TOKENS} are taken at once")
    checked = _checked("token_ids", ids, tokenizer.vocab_size)
    if (characters := tokenizer.spelt_characters(checked)) > MAX_CHARACTERS:
        raise InvalidRequest(
            "token_ids", f"spell up to {characters} characters; at most {MAX_CHARACTERS} are told at once"
        )
    return tokenizer.decode(checked.tolist())


def check_text(field: str, text: str) -> str:
    if not text:
        raise InvalidRequest(field, "must not be empty")
    return text


def _finite(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(field, f"must be a number in {'(' if open_low else '['}{low:g}, {high:g}], not {value}")
    return value


def _sampling(params: inference_pb2.SamplingParams, recommended: GenerationDefaults) -> SamplingParams:
    def given(name: str, default: float) -> Any:
        if params.HasField(name):
            return getattr(params, name)
        own = getattr(recommended, name)
        return default if own is None else own

    top_k = given("top_k", 0)
    if top_k >= 1 << 31:
        raise InvalidRequest("sampling.top_k", f"must be below 2^31, not {top_k}")
    return SamplingParams(
        temperature=_finite("sampling.temperature", given("temperature", 1.0), 0.0, MAX_TEMPERATURE),
        top_k=top_k,
        top_p=_finite("sampling.top_p", given("top_p", 1.0), 0.0, 1.0, open_low=True),
        min_p=_finite("sampling.min_p", given("min_p", 0.0), 0.0, 1.0),
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
    )


def prompt_ids(
    message: inference_pb2.GenerateRequest, tokenizer: Tokenizer, chat: ChatTemplate | None, context_length: int
) -> list[int]:
    """Tokens of the prompt. Raises InvalidRequest, of a text that can't fit into the context before it is encoded. Long
    texts, and messages, take a while: call it off the event loop.

    chat: the model's template for messages, if it has one.
    """
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "give text, token_ids or messages")
    if message.parse_special and kind != "text":
        raise InvalidRequest("parse_special", f"is for text: in {kind} a special token is always one")
    if kind == "messages":
        text = _rendered(message.messages, chat)
        return _encoded("messages.messages", text, tokenizer.encode_chat, tokenizer, context_length)
    if kind == "text":
        encode = partial(tokenizer.encode, parse_special=message.parse_special)
        return _encoded("text", check_text("text", message.text), encode, tokenizer, context_length)
    ids = message.token_ids.ids
    if not ids:
        raise InvalidRequest("token_ids.ids", "must not be empty")
    if len(ids) >= context_length:
        raise _too_long("token_ids.ids", len(ids), context_length)
    return check_token_ids("token_ids.ids", ids, tokenizer.vocab_size)


def _encoded(
    field: str, text: str, encode: Callable[[str, int], list[int]], tokenizer: Tokenizer, context_length: int
) -> list[int]:
    most = tokenizer.most_characters(context_length)
    if len(text) > most:
        raise InvalidRequest(field, f"has {len(text)} characters; a context of {context_length} takes at most {most}")
    try:
        return encode(text, context_length - 1)
    except TooManyTokens as error:
        raise _too_long(field, error.counted, context_length) from None
    except TextError as error:
        raise InvalidRequest(field, str(error)) from None


def _too_long(field: str, tokens: int | str, context_length: int) -> InvalidRequest:
    return InvalidRequest(field, f"has {tokens} tokens; the context of {context_length} needs room for one more")


def _rendered(conversation: inference_pb2.Messages, chat: ChatTemplate | None) -> str:
    """The conversation as the model's template writes it. Raises InvalidRequest."""
    if chat is None:
        raise InvalidRequest("messages", "this model has no chat template: give text or token_ids")
    if not 1 <= len(conversation.messages) <= MAX_MESSAGES:
        raise InvalidRequest("messages.messages", f"has {len(conversation.messages)}; give 1 to {MAX_MESSAGES}")
    for index, turn in enumerate(conversation.messages):
        check_text(f"messages.messages[{index}].role", turn.role)
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
    try:
        text = chat.render(turns, arguments=_arguments(conversation.template_arguments_json))
    except ChatError as error:
        raise InvalidRequest("messages", str(error)) from None
    if not text:
        raise InvalidRequest("messages", "the chat template writes nothing for them")
    return text


def _arguments(text: str) -> dict[str, Any]:
    """Raises InvalidRequest naming the field."""
    field = "messages.template_arguments_json"
    if len(text) > MAX_ARGUMENTS:
        raise InvalidRequest(field, f"has {len(text)} characters; at most {MAX_ARGUMENTS}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            raise ValueError("an object has a key twice")
        return members

    def finite(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        value = json.loads(text or "{}", object_pairs_hook=unique, parse_constant=finite)
    except RecursionError:
        raise InvalidRequest(field, "is nested too deep") from None
    except ValueError as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(field, "must be a JSON object")
    return value


def build_request(
    message: inference_pb2.GenerateRequest,
    prompt: list[int],
    tokenizer: Tokenizer,
    context_length: int,
    recommended: GenerationDefaults,
) -> Request:
    """The engine's request; what it leaves open is as `recommended`. Raises InvalidRequest naming the field in the
    API's words."""
    if len(message.request_id) > MAX_REQUEST_ID or not message.request_id.isprintable():
        raise InvalidRequest("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")
    stop = message.stop
    if len(stop.token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequest("stop.token_ids", f"has {len(stop.token_ids)} ids; at most {MAX_STOP_TOKENS}")
    stop_ids = check_token_ids("stop.token_ids", stop.token_ids, tokenizer.vocab_size)
    fields = {"text": "text", "messages": "messages.messages"}
    field = fields.get(message.WhichOneof("prompt") or "", "token_ids.ids")
    left = context_length - len(prompt)
    if max(prompt, default=0) >= tokenizer.vocab_size:
        raise InvalidRequest(field, f"spells the token {max(prompt)}, which the model has no embedding for")
    max_tokens = stop.max_tokens if stop.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, left)
    return Request(
        id=message.request_id or secrets.token_hex(8),
        prompt=prompt,
        sampling=_sampling(message.sampling, recommended),
        max_tokens=max_tokens,
        stop_ids=frozenset(stop_ids),
        eos_ids=frozenset() if stop.ignore_eos else tokenizer.eos_ids,
    )
