"""Turns a question into the engine's Request, with every check, in one place that all front ends share. Errors name the
library's argument (isthmus/types.py); a front end whose fields have other names renames it."""

from __future__ import annotations

import hashlib
import math
import operator
import secrets
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from isthmus.errors import InvalidRequest
from isthmus.model.text.chat import ChatError, ChatTemplate
from isthmus.model.text.tokenizer import TextError, Tokenizer, TooManyTokens
from isthmus.model.weights.folder import GenerationDefaults, ModelFolder
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import MOST_LOGPROBS, Sampling
from isthmus.types import (
    NO_LIMIT,
    Conversation,
    Question,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    check_cache,
    check_sized,
    check_string,
    check_turn,
)

T = TypeVar("T", int, float)

DEFAULT_MAX_TOKENS = 256
MAX_REQUEST_ID = 128
"""Most characters of a request's id"""
MAX_STOP_TOKENS = 64
MAX_PRIORITY = 100
"""The highest priority, and minus the lowest"""
MAX_SALT = 256
"""Most characters of a request's cache_salt"""
MAX_TEMPERATURE = 100.0
MAX_MESSAGES = 1024
MAX_TOKENS = 1 << 18
"""Most tokens of a text that `tokenized` or `detokenized` takes: more would hold up all streams while they become a
list"""
_MOST_BITS = 256
"""Bits of a whole number that a message about it can show"""
MAX_CHARACTERS = 4_000_000
"""Most characters of a text that `detokenized` returns"""


@dataclass(frozen=True)
class Preparation:
    """Makes requests of questions with a model's tokenizer and template. Safe to share between threads; long texts, and
    messages, take a while."""

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    """The model's template for messages, if it has one"""
    recommended: GenerationDefaults
    """The sampling settings for what a question leaves open"""
    context_length: int

    @classmethod
    def of(cls, model: ModelFolder, context_length: int) -> Preparation:
        """The preparation for a model. context_length: the engine's, in tokens."""
        return cls(model.tokenizer, model.chat, model.generation, context_length)

    def request(self, question: Question, *, tenant: str = "", deadline: float | None = None) -> Request:
        """The engine's request for a question. Raises InvalidRequest. `Engine.submit` checks the rest.

        tenant: who asks. Tenants share the engine, and never what the prefix cache has. deadline: when the caller stops
        waiting, on the clock of time.perf_counter.
        """
        asked, service = question.sampling, question.service
        priority, limit, cache = _priority(service.priority), _limit(service.max_queue_time), check_cache(service.cache)
        salt = _salt(tenant, service.cache_salt)
        prompt = self.prompt_ids(question.prompt)
        left = self.context_length - len(prompt)
        return Request(
            id=_request_id(question.request_id),
            prompt=prompt,
            stop_ids=self._stop_ids(asked),
            sampling=_sampling(asked, self.recommended),
            max_tokens=_int("max_tokens", _first(asked.max_tokens, None, min(DEFAULT_MAX_TOKENS, left))),
            eos_ids=frozenset() if _flag("ignore_eos", asked.ignore_eos) else self.tokenizer.eos_ids,
            tenant=tenant,
            priority=priority,
            deadline=deadline,
            max_queue_time=limit,
            cache_salt=salt,
            cache_read=cache in ("on", "read"),
            cache_write=cache in ("on", "write"),
        )

    def prompt_ids(self, prompt: TextPrompt | TokenPrompt | Conversation) -> list[int]:
        """Token ids of the prompt. Raises InvalidRequest; a text that can't fit into the context is refused before it
        is encoded."""
        match prompt:
            case Conversation():
                text = self._rendered(prompt)
                return self._encoded("messages", text, self.tokenizer.encode_chat)
            case TextPrompt():
                parsed = _flag("parse_special", prompt.parse_special)
                encode = partial(self.tokenizer.encode, parse_special=parsed)
                return self._encoded("prompt", check_text("prompt", prompt.text), encode)
            case TokenPrompt():
                return self._given(prompt.ids)

    def _given(self, ids: Sequence[int]) -> list[int]:
        if not len(check_sized("prompt", ids)):
            raise InvalidRequest("prompt", "must not be empty")
        if len(ids) >= self.context_length:
            raise self._too_long("prompt", len(ids))
        return check_token_ids("prompt", ids, self.tokenizer.vocab_size).tolist()

    def _encoded(self, field: str, text: str, encode: Callable[[str, int], list[int]]) -> list[int]:
        most = self.tokenizer.most_characters(self.context_length)
        if len(text) > most:
            raise InvalidRequest(
                field, f"has {len(text)} characters; a context of {self.context_length} takes at most {most}"
            )
        try:
            ids = encode(text, self.context_length - 1)
        except TooManyTokens as error:
            raise self._too_long(field, error.counted) from None
        except TextError as error:
            raise InvalidRequest(field, str(error)) from None
        if max(ids, default=0) >= self.tokenizer.vocab_size:
            raise InvalidRequest(field, f"spells the token {max(ids)}, which the model has no embedding for")
        return ids

    def _too_long(self, field: str, tokens: int | str) -> InvalidRequest:
        return InvalidRequest(
            field, f"has {tokens} tokens; the context of {self.context_length} needs room for one more"
        )

    def _rendered(self, conversation: Conversation) -> str:
        """The conversation as the model's template writes it. Raises InvalidRequest."""
        if self.chat is None:
            raise InvalidRequest(
                "chat_template", "this model has no chat template: give it a text or token ids instead of messages"
            )
        if not 1 <= len(conversation.messages) <= MAX_MESSAGES:
            raise InvalidRequest("messages", f"has {len(conversation.messages)}; give 1 to {MAX_MESSAGES}")
        turns = [check_turn(index, turn) for index, turn in enumerate(conversation.messages)]
        try:
            text = self.chat.render(turns, arguments=conversation.template_arguments)
        except ChatError as error:
            raise InvalidRequest("chat_template", str(error)) from None
        if not text:
            raise InvalidRequest("chat_template", "the chat template writes nothing for these messages")
        return text

    def _stop_ids(self, asked: SamplingParams) -> frozenset[int]:
        given = check_sized("stop_token_ids", asked.stop_token_ids)
        if len(given) > MAX_STOP_TOKENS:
            raise InvalidRequest("stop_token_ids", f"has {len(given)} ids; at most {MAX_STOP_TOKENS}")
        return frozenset(check_token_ids("stop_token_ids", given, self.tokenizer.vocab_size).tolist())


def tokenized(tokenizer: Tokenizer, text: str, *, parse_special: bool = False) -> list[int]:
    """The token ids of a text that is no prompt. Raises InvalidRequest."""
    try:
        return tokenizer.encode(check_text("text", text), MAX_TOKENS, parse_special=parse_special)
    except TooManyTokens as error:
        raise InvalidRequest("text", f"{error} are returned at once: split it") from None
    except TextError as error:
        raise InvalidRequest("text", str(error)) from None


def detokenized(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids. Raises InvalidRequest."""
    if len(check_sized("token_ids", ids)) > MAX_TOKENS:
        raise InvalidRequest("token_ids", f"has {len(ids)} ids; at most {MAX_TOKENS} are taken at once")
    checked = check_token_ids("token_ids", ids, tokenizer.vocab_size)
    if (characters := tokenizer.spelt_characters(checked)) > MAX_CHARACTERS:
        raise InvalidRequest(
            "token_ids", f"spell up to {characters} characters; at most {MAX_CHARACTERS} are returned at once"
        )
    return tokenizer.decode(checked.tolist())


def check_text(field: str, text: str) -> str:
    """Returns the text. Raises InvalidRequest if it is empty, or isn't text."""
    if not check_string(field, text):
        raise InvalidRequest(field, "must not be empty")
    return text


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """The ids as int64[len(ids)]. Raises InvalidRequest for what aren't whole numbers, and for the first id that the
    tokenizer doesn't have."""
    try:
        values = _integers(ids)
    except (OverflowError, TypeError, ValueError):
        raise InvalidRequest(field, "must hold whole numbers below 2^63") from None
    wrong = np.flatnonzero((values < 0) | (values >= vocab_size))
    if wrong.size:
        token = values[wrong[0]]
        raise InvalidRequest(f"{field}[{wrong[0]}]", f"{token} is not a token id; the vocabulary has {vocab_size}")
    return values


def _integers(ids: Sequence[int]) -> np.ndarray:
    """int64[len(ids)]. Raises OverflowError or TypeError; numpy would cut fractions off and read numbers in strings."""
    if isinstance(ids, list | tuple):
        return np.frombuffer(array("q", ids), np.int64) if ids else np.zeros(0, np.int64)
    values = np.asarray(ids)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError
    if values.size and int(values.max()) >= 1 << 63:
        raise OverflowError
    return values.astype(np.int64)


def _request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID or not given.isprintable():
        raise InvalidRequest("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")
    return given or secrets.token_hex(8)


def _priority(given: int) -> int:
    priority = _int("priority", given)
    if abs(priority) > MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be {-MAX_PRIORITY} to {MAX_PRIORITY}, not {priority}")
    return priority


def _limit(seconds: float | None) -> float | None:
    if seconds is None:
        return None
    return float(_within("max_queue_time", seconds, 0, NO_LIMIT, open_low=True))


def _salt(tenant: str, given: str) -> bytes:
    """What only a tenant's requests with the same cache_salt have in common: no salt that one tenant can give leads to
    another's pages."""
    if len(check_string("cache_salt", given)) > MAX_SALT:
        raise InvalidRequest("cache_salt", f"has {len(given)} characters; at most {MAX_SALT}")
    return hashlib.sha256(tenant.encode()).digest() + given.encode()


def _sampling(asked: SamplingParams, recommended: GenerationDefaults) -> Sampling:
    top_k = _first(asked.top_k, recommended.top_k, 0)
    return Sampling(
        temperature=_within("temperature", _first(asked.temperature, recommended.temperature, 1.0), 0, MAX_TEMPERATURE),
        top_k=_whole("top_k", top_k, 31),
        top_p=_within("top_p", _first(asked.top_p, recommended.top_p, 1.0), 0, 1, open_low=True),
        min_p=_within("min_p", _first(asked.min_p, recommended.min_p, 0.0), 0, 1),
        seed=_whole("seed", asked.seed, 64) if asked.seed is not None else secrets.randbits(63),
        logprobs=_logprobs(asked.logprobs),
    )


def _logprobs(count: int | None) -> int:
    if count is None:
        return -1
    count = _int("logprobs", count)
    if not 0 <= count <= MOST_LOGPROBS:
        raise InvalidRequest("logprobs", f"must be 0 to {MOST_LOGPROBS}, not {count}")
    return count


def _first(asked: T | None, recommended: T | None, default: T) -> T:
    return asked if asked is not None else recommended if recommended is not None else default


def _int(field: str, value: int) -> int:
    """A whole number as Python's own. Raises InvalidRequest."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidRequest(field, f"must be a whole number, not {_shown(value)}") from None
    if number.bit_length() > _MOST_BITS:
        raise InvalidRequest(field, f"must have at most {_MOST_BITS} bits, not {number.bit_length()}")
    return number


def _shown(value: object) -> str:
    """A wrong value for a message, whatever it is."""
    return f"{value!r:.80}" if isinstance(value, str | bytes | float | bool | None) else f"a value of {type(value)}"


def _flag(field: str, value: bool) -> bool:
    if not isinstance(value, bool | np.bool_ | int):
        raise InvalidRequest(field, f"must be True or False, not {_shown(value)}")
    return bool(value)


def _whole(field: str, value: int, bits: int) -> int:
    value = _int(field, value)
    if not 0 <= value < 1 << bits:
        raise InvalidRequest(field, f"must be below 2^{bits}, not {value}" if value > 0 else f"must not be {value}")
    return value


def _within(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    try:
        finite = math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(field, f"must be a number in [{low:g}, {high:g}], not {_shown(value)}") from None
    if not finite or not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(field, f"must be a number in {'(' if open_low else '['}{low:g}, {high:g}], not {value}")
    return value
