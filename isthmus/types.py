"""Questions for a model and its answers, the same for LLM, Client and AsyncClient: frozen dataclasses, without jax.

A later option is added as a field of SamplingParams whose default changes nothing, and as a key of SamplingOptions;
what it returns is added as a field of Completion and Delta with a default. A form of text is added in
forms.py.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypedDict, Unpack, cast, get_args

from isthmus.arguments import check_int, shown
from isthmus.errors import InvalidRequest
from isthmus.forms import FormatOptions, ResponseFormat, check_string, response_format

Prompt = str | Sequence[int]
"""A text, or its token ids"""
Message = Mapping[str, str]
"""One turn of a conversation: {"role": …, "content": …}"""
Messages = Sequence[Message]
"""A conversation, in order"""


class SamplingOptions(FormatOptions, total=False):
    """The fields of SamplingParams as keywords of a call, but for `response_format`, which FormatOptions spell."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    max_tokens: int | None
    stop_token_ids: Sequence[int]
    stop: str | Sequence[str]
    include_stop: bool
    skip_special_tokens: bool
    truncate_prompt_tokens: int | None
    resume_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int] | None
    bad_token_ids: Sequence[int]
    min_tokens: int | None
    n: int
    prompt_logprobs: int | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when that ends. None takes what the model's generation_config.json recommends, or, if it
    recommends nothing, the default that is named here."""

    temperature: float | None = None
    """0 is greedy; by default 1"""
    top_p: float | None = None
    """Keeps the smallest set of tokens whose probabilities sum to at least this; in (0, 1], by default 1: off"""
    top_k: int | None = None
    """Keeps the k likeliest tokens; by default 0, which is off"""
    min_p: float | None = None
    """Keeps tokens at least this fraction as likely as the likeliest; in [0, 1], by default 0, which is off"""
    seed: int | None = None
    """64 bits that fix the draws; by default new ones each time, which Completion.seed has"""
    max_tokens: int | None = None
    """Most tokens to draw; by default 256, or what is left of the context if that is less"""
    stop_token_ids: Sequence[int] = ()
    """Drawing one of these tokens ends the text, which doesn't include it"""
    stop: str | Sequence[str] = ()
    """The text ends before the first of these strings that it comes to hold: at most 16, of at most 256 characters
    each. The first is the one that ends first; of those that end at the same character it is the longest. What the
    prompt ends in is no part of it. By default those that the model's generation_config.json names (stop_strings)"""
    include_stop: bool = False
    """Whether the text has the string of `stop` that ended it"""
    skip_special_tokens: bool = True
    """Whether special tokens are no text. False spells them out, and `stop` finds them; the token that ends the
    sequence is no text all the same"""
    truncate_prompt_tokens: int | None = None
    """Keeps only so many of the prompt's last tokens, at least 1, whichever those are: one that the tokenizer or a
    template puts first is cut off with the rest. None refuses a prompt that doesn't fit into the context"""
    ignore_eos: bool = False
    """Whether to go on past the end-of-sequence token, and past strings of generation_config.json"""
    logprobs: int | None = None
    """Tells the log-probability of each token that is drawn, and of so many of the likeliest tokens at its place, at
    most 20; None tells nothing"""
    repetition_penalty: float | None = None
    """Divides the logit of each token that prompt or answer has, if it is positive, and multiplies it otherwise; in
    [1e-6, 10], by default 1, which is off"""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit for each time that the answer has it; in [-2, 2], by default 0"""
    presence_penalty: float | None = None
    """Subtracted from the logit of each token that the answer has; in [-2, 2], by default 0"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of these token ids, at most 300, each in [-100, 100]; it comes before penalties"""
    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may be drawn; None allows all. The end of the text is one of them only if it is named. Where
    `response_format` leaves none of them, it decides"""
    bad_token_ids: Sequence[int] = ()
    """Tokens that are never drawn, unless `response_format` leaves no others"""
    min_tokens: int | None = None
    """The number of tokens before which none is drawn that ends the text; by default 0"""
    n: int = 1
    """Completions to draw for the prompt, which is computed once; at most 128, and as the server has room for.
    Each takes a place as a request of its own does. Completion i is what the seed plus i draws alone"""
    prompt_logprobs: int | None = None
    """Tells the log-probability of each token of the prompt but the first, and of so many of the likeliest tokens at
    its place, at most 20; None tells nothing. The prompt takes longer then, and isn't read from the prefix cache"""
    resume_token_ids: Sequence[int] = ()
    """Tokens of an answer that broke off, to the same prompt with the same options and `seed`, which nothing depends on
    at temperature 0: this one goes on after them, exactly as that one would have, also elsewhere. They count as drawn,
    and are no part of this answer"""
    response_format: ResponseFormat | None = None
    """What the text must be: tokens that lead elsewhere are never drawn. A text that max_tokens, the context or a stop
    token cuts off is the beginning of such a text"""

    def replace(self, **options: Unpack[SamplingOptions]) -> SamplingParams:
        """A copy with these fields changed. Raises InvalidRequest for two forms of text."""
        fields = cast("dict[str, object]", options)
        forms = {name: fields.pop(name) for name in FormatOptions.__annotations__ if name in fields}
        if forms:
            fields["response_format"] = response_format(cast(FormatOptions, forms))
        return dataclasses.replace(self, **fields) if fields else self  # type: ignore[arg-type]


Cache = Literal["on", "read", "write", "off"]
"""What a request may do with the prefix cache: on reads and writes, off does neither"""


class ServiceOptions(TypedDict, total=False):
    """The fields of Service as keywords of a call."""

    priority: int
    max_queue_time: float | None
    cache: Cache
    cache_salt: str
    predicted_text: str
    model: str


class AskOptions(SamplingOptions, ServiceOptions, total=False):
    """Keywords of a call that say what is asked for, and how it is served."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """How a request is served, which doesn't change its text."""

    priority: int = 0
    """The higher, the sooner it starts; -100 to 100"""
    max_queue_time: float | None = None
    """Most seconds until it starts, above 0: then it ends as Overloaded. None is no limit"""
    cache: Cache = "on"
    """Whether it may start from what other requests have computed of its prompt (read), and leaves its own for later
    ones (write)"""
    cache_salt: str = ""
    """Only requests with the same salt share what was computed, so that the time to the first token tells nobody else
    what was asked; at most 256 characters"""
    predicted_text: str = ""
    """What the text is expected to be, such as the code of which a changed version is asked: where that is right, the
    text comes sooner"""
    model: str = ""
    """The name of the model that is asked; another than the one that is there is ModelNotFound. Empty asks whichever is
    there"""


class FinishReason(StrEnum):
    """Why a text ended."""

    EOS = "EOS"
    """An end-of-sequence token was drawn"""
    STOP_TOKEN = "STOP_TOKEN"
    """One of stop_token_ids was drawn"""
    COMPLETE = "COMPLETE"
    """The text is all that its form allows, and nothing may follow"""
    STOP_STRING = "STOP_STRING"
    """The text holds one of the strings of `stop`"""
    LENGTH = "LENGTH"
    """max_tokens were drawn"""
    CONTEXT_LENGTH = "CONTEXT_LENGTH"
    """The model's context is full"""


@dataclass(frozen=True)
class TokenLogprobs:
    """What a model thought of a token that was drawn: natural logarithms of probabilities in its own distribution,
    before temperature and filters."""

    logprob: float
    """The drawn token's"""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of as many of the likeliest tokens at its place as were asked for, the likeliest
    first"""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]
    """The ids of the text, without the token that ended the sequence. If a string of `stop` ended it, these are all ids
    up to the one that completed the string, whose text may go further than `text`"""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of token_ids; None unless SamplingParams.logprobs asks for them"""
    finish_reason: FinishReason
    stop_token_id: int | None = None
    """The token that ended the sequence, if finish_reason is EOS or STOP_TOKEN"""
    stop_string: str | None = None
    """The string of `stop` that ended the text, if finish_reason is STOP_STRING"""
    seed: int
    """The seed that was used; the same request with it draws the same tokens again"""
    prompt_tokens: int
    cached_prompt_tokens: int
    """Tokens of the prompt read from the prefix cache; always 0 from a server without --report-cached-tokens"""
    completion_tokens: int
    """Tokens drawn, including the one that ended the sequence; up to the one that completed a string of `stop`"""
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption"""
    preemptions: int = 0
    queue_seconds: float = 0.0
    """Seconds from the request's arrival at the engine until the engine began it"""
    time_to_first_token: float
    """Seconds from arrival to the first token, as the engine measured them"""
    total_seconds: float = 0.0
    """Seconds from arrival to the end, as the engine measured them"""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each token of the prompt but the first; None unless SamplingParams.prompt_logprobs asks for them"""
    alternatives: tuple[Completion, ...] = ()
    """The other completions of the same prompt, if SamplingParams.n asks for more than one"""

    @property
    def choices(self) -> tuple[Completion, ...]:
        """All completions of the prompt, of which this is the first."""
        return (self, *self.alternatives)


@dataclass(frozen=True)
class Delta:
    """What is new in a stream. Texts are whole characters; all of them together are the completion's text. What may
    still become a string of `stop` comes later than its tokens."""

    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None
    """The whole completion, in its last delta"""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of token_ids; None unless SamplingParams.logprobs asks for them"""
    index: int = 0
    """Which of the SamplingParams.n completions this belongs to; each has a last delta of its own"""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each token of the prompt but the first, in the first delta of the completion; None in the others"""


# What a front end makes of a call


@dataclass(frozen=True)
class TextPrompt:
    """A text to continue."""

    text: str
    parse_special: bool = False
    """Whether a special token that the text spells out is read as that token, instead of as text"""


@dataclass(frozen=True)
class TokenPrompt:
    """The token ids of a text to continue."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Conversation:
    """Messages to answer, which the model's chat template writes as text."""

    messages: Messages
    template_arguments: Mapping[str, object] = field(default_factory=dict)
    """Variables of the template, such as {"enable_thinking": False}; they reach it in this order"""


NO_LIMIT = 1e8
"""Seconds, about three years: a timeout that is longer is none, because clocks can't hold every number"""


def check_timeout(timeout: float | None) -> float | None:
    """A call's timeout in seconds; None where there is none. Raises InvalidRequest for what isn't a number."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real) or timeout != timeout:
        raise InvalidRequest("timeout", f"must be a number of seconds or None, not {timeout!r:.80}")
    return None if timeout > NO_LIMIT else float(max(timeout, -NO_LIMIT))


def check_cache(cache: Cache) -> Cache:
    """Raises InvalidRequest for what isn't one."""
    if cache not in get_args(Cache):
        raise InvalidRequest("cache", f"must be one of {', '.join(get_args(Cache))}, not {cache!r:.80}")
    return cache


MAX_PRIORITY = 100
"""The highest priority, and minus the lowest"""


def check_priority(priority: int) -> int:
    """Raises InvalidRequest for what isn't one."""
    checked = check_int("priority", priority)
    if abs(checked) > MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be {-MAX_PRIORITY} to {MAX_PRIORITY}, not {checked}")
    return checked


def check_bias(bias: Mapping[int, float]) -> Mapping[int, float]:
    """The map, whose numbers are not looked at. Raises InvalidRequest for what is none, and for a key that is no whole
    number."""
    if not isinstance(bias, Mapping):
        raise InvalidRequest("logit_bias", f"must map token ids to numbers, not be {type(bias).__name__}")
    for token in bias:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise InvalidRequest("logit_bias", f"must map token ids to numbers, and {shown(token)} is no token id")
    return bias


def check_sized(field: str, ids: Sequence[int]) -> Sequence[int]:
    """Token ids, which are not looked at. Raises InvalidRequest for what is no sequence, and for text and bytes."""
    try:
        len(ids), iter(ids)
        sized = not isinstance(ids, str | bytes | bytearray | Mapping)
    except TypeError:
        sized = False
    if not sized:
        raise InvalidRequest(field, f"must be a sequence of token ids, not {type(ids).__name__}")
    return ids


def check_prompt(ids: Sequence[int]) -> Sequence[int]:
    """A prompt that is no text, and whose ids are not looked at. Raises InvalidRequest for what is no sequence."""
    if isinstance(ids, Mapping):
        raise InvalidRequest("prompt", "is a message: give chat a list of messages")
    if isinstance(ids, Sequence) and ids and isinstance(ids[0], str):
        raise InvalidRequest("prompt", "is several texts, where one text or its token ids are to be given")
    if not isinstance(ids, Iterable):
        raise InvalidRequest("prompt", f"must be a text or a sequence of token ids, not {type(ids).__name__}")
    return check_sized("prompt", ids)


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The strings of `stop`; one that is given by itself is the only one. Raises InvalidRequest for what isn't
    strings."""
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence) or isinstance(stop, bytes | bytearray):
        raise InvalidRequest("stop", f"must be a string or a sequence of strings, not {type(stop).__name__}")
    return tuple(check_string(f"stop[{index}]", string) for index, string in enumerate(stop))


MAX_MESSAGES = 1024
"""Messages of a conversation"""


def check_turns(messages: Messages) -> list[dict[str, str]]:
    """The turns of a conversation, as `check_turn` gives them. Raises InvalidRequest."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            "messages", f"must be a list of messages with role and content, not {type(messages).__name__}"
        )
    if len(messages) > MAX_MESSAGES or not messages:
        raise InvalidRequest("messages", f"has {len(messages)}; give 1 to {MAX_MESSAGES}")
    return [check_turn(index, turn) for index, turn in enumerate(messages)]


def check_turn(index: int, turn: Message) -> dict[str, str]:
    """A turn with role and content. Raises InvalidRequest for what isn't a message, for an empty role, for other keys,
    and for values that aren't strings."""
    where = f"messages[{index}]"
    if not isinstance(turn, Mapping):
        raise InvalidRequest(where, f"must be a message with role and content, not {type(turn).__name__}")
    if unknown := sorted(turn.keys() - {"role", "content"}, key=repr):
        raise InvalidRequest(where, f"has the key {unknown[0]!r}; a message has role and content")
    if missing := {"role", "content"} - turn.keys():
        raise InvalidRequest(f"{where}.{max(missing)}", "must be given")
    checked = {"role": turn["role"], "content": turn["content"]}
    for key, value in checked.items():
        check_string(f"{where}.{key}", value)
    if not checked["role"]:
        raise InvalidRequest(f"{where}.role", "must not be empty")
    return checked


@dataclass(frozen=True)
class Question:
    """Everything that is asked for one completion."""

    prompt: TextPrompt | TokenPrompt | Conversation
    sampling: SamplingParams = SamplingParams()
    request_id: str = ""
    """The request's name in logs and for cancelling it; if it is empty, a name is made"""
    service: Service = Service()
