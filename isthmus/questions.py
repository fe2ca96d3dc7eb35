"""Makes questions of the arguments of a call: the same for every kind of model."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast, get_type_hints

from isthmus.errors import InvalidRequest
from isthmus.scores import Continuation, EmbedQuestion, Pooling, ScoreQuestion
from isthmus.types import (
    AskOptions,
    Conversation,
    Messages,
    Prompt,
    Question,
    SamplingOptions,
    SamplingParams,
    Service,
    ServiceOptions,
    TextPrompt,
    TokenPrompt,
    check_timeout,
)

P = TypeVar("P", bound=Prompt)
C = TypeVar("C", bound=Messages)


class CallOptions(AskOptions, total=False):
    """Keywords of a call. The fields of SamplingParams among them replace those of `sampling`, for this call; those of
    Service say how it is served."""

    timeout: float | None
    """Seconds until DeadlineExceeded, for each item of a list; None is no limit"""
    progress: bool | None
    """Whether to show how much of a list is done; None shows it if standard error is a terminal"""


class GenerateOptions(CallOptions, total=False):
    """Keywords of `generate`."""

    parse_special: bool
    """Whether a special token that a text spells out is read as that token, instead of as text"""


class ChatOptions(CallOptions, total=False):
    """Keywords of `chat`."""

    template_arguments: Mapping[str, object]
    """Variables of the chat template, such as {"enable_thinking": False}; they reach it in this order"""


class ScoreOptions(ServiceOptions, total=False):
    """Keywords of `score`."""

    logprobs: int | None
    """Tells the log-probability of each token, and of so many of the likeliest tokens at its place, at most 20"""
    truncate_prompt_tokens: int | None
    """As in SamplingParams, of the prompt"""
    parse_special: bool
    template_arguments: Mapping[str, object]
    timeout: float | None


class EmbedOptions(ServiceOptions, total=False):
    """Keywords of `embed`."""

    pooling: Pooling
    """Which of the model's last hidden states make the vector: the mean of all (the default), or the last token's"""
    normalize: bool
    """Whether vectors are scaled to length 1, as by default"""
    dimensions: int | None
    """How many of a vector's first numbers are kept, before it is scaled, for a model that is trained so"""
    truncate_prompt_tokens: int | None
    """As in SamplingParams"""
    parse_special: bool
    template_arguments: Mapping[str, object]
    timeout: float | None


class StreamOptions(AskOptions, total=False):
    """Keywords of `stream`, which mean what they do for `generate` and `chat`."""

    timeout: float | None
    parse_special: bool
    template_arguments: Mapping[str, object]


def to_question(
    prompt: object,
    sampling: SamplingParams | None,
    options: AskOptions,
    parse_special: bool = False,
    arguments: Mapping[str, object] | None = None,
    *,
    chat: bool = False,
) -> Question:
    """The question that the arguments of a call ask. chat: whether the prompt must be messages. Raises TypeError for an
    unknown option and for sampling that isn't SamplingParams, and InvalidRequest for an option that doesn't go with the
    prompt."""
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling must be SamplingParams, not {type(sampling).__name__}")
    service = {name: value for name, value in options.items() if name in ServiceOptions.__annotations__}
    drawn = {name: value for name, value in options.items() if name not in service}
    asked = (sampling or SamplingParams()).replace(**cast(SamplingOptions, drawn))
    kind = to_conversation(prompt, arguments) if chat else to_prompt(prompt, parse_special, arguments)
    return Question(kind, asked, service=Service(**cast(ServiceOptions, service)))


def to_prompt(
    prompt: object, parse_special: bool = False, arguments: Mapping[str, object] | None = None
) -> TextPrompt | TokenPrompt | Conversation:
    """The prompt that arguments give, which isn't looked at. Raises InvalidRequest for an option that doesn't go with
    it."""
    if isinstance(prompt, str):
        kind: TextPrompt | TokenPrompt | Conversation = TextPrompt(prompt, parse_special)
    elif is_conversation(prompt):
        kind = to_conversation(prompt, arguments)
    else:
        kind = TokenPrompt(cast(Sequence[int], prompt))
    if parse_special and not isinstance(kind, TextPrompt):
        raise InvalidRequest("parse_special", "is for a text only: in messages a special token is always read as one")
    if arguments is not None and not isinstance(kind, Conversation):
        raise InvalidRequest("template_arguments", "are for messages only")
    return kind


def to_conversation(messages: object, arguments: Mapping[str, object] | None) -> Conversation:
    """Messages, which are not looked at, and what the template is given. Raises InvalidRequest."""
    if arguments is not None and not isinstance(arguments, Mapping):
        raise InvalidRequest("template_arguments", f"must be a mapping, not {type(arguments).__name__}")
    return Conversation(cast(Messages, messages), arguments or {})


def to_streamed(
    prompt: Prompt | Messages, sampling: SamplingParams | None, options: StreamOptions
) -> tuple[Question, float | None]:
    """The question and the timeout that the arguments of `stream` give."""
    rest = dict(options)
    timeout, parsed = rest.pop("timeout", None), rest.pop("parse_special", False)
    arguments = rest.pop("template_arguments", None)
    asked = to_question(
        prompt,
        sampling,
        cast(AskOptions, rest),
        cast(bool, parsed),
        cast("Mapping[str, object] | None", arguments),
    )
    return asked, check_timeout(cast("float | None", timeout))


def is_conversation(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def prompts_of(prompt: Prompt | list[P]) -> list[P] | None:
    """The prompt as a list of prompts; None if it is a single one. A list of numbers is one prompt, of token ids."""
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], numbers.Integral)):
        return cast("list[P]", prompt)
    return None


def conversations_of(messages: Messages | list[C]) -> list[C] | None:
    """The messages as a list of conversations; None if they are a single one."""
    if isinstance(messages, list) and not is_conversation(messages):
        return cast("list[C]", messages)
    return None


def to_score_question(
    prompt: Prompt | Messages, continuations: Sequence[Continuation], options: ScoreOptions
) -> tuple[ScoreQuestion, float | None]:
    """The question and the timeout that the arguments of `score` give. Raises as `to_question` does."""
    kind, service, timeout, rest = _given(prompt, cast("dict[str, object]", options), ScoreOptions)
    return ScoreQuestion(kind, continuations, service=service, **rest), timeout  # type: ignore[arg-type]


def to_embed_question(prompt: Prompt | Messages, options: EmbedOptions) -> tuple[EmbedQuestion, float | None]:
    """The question and the timeout that the arguments of `embed` give for one text. Raises as `to_question` does."""
    kind, service, timeout, rest = _given(prompt, cast("dict[str, object]", options), EmbedOptions)
    return EmbedQuestion(kind, service=service, **rest), timeout  # type: ignore[arg-type]


def _given(
    prompt: Prompt | Messages, options: Mapping[str, object], known: type
) -> tuple[TextPrompt | TokenPrompt | Conversation, Service, float | None, dict[str, object]]:
    """Prompt, service, timeout, and the other options. known: the TypedDict that has all of them."""
    rest = dict(options)
    for name in rest:
        if name not in get_type_hints(known):
            raise TypeError(f"unknown option {name!r}; there are {', '.join(sorted(get_type_hints(known)))}")
    timeout = check_timeout(cast("float | None", rest.pop("timeout", None)))
    parsed = cast(bool, rest.pop("parse_special", False))
    arguments = cast("Mapping[str, object] | None", rest.pop("template_arguments", None))
    service = {name: rest.pop(name) for name in ServiceOptions.__annotations__ if name in rest}
    return to_prompt(prompt, parsed, arguments), Service(**cast(ServiceOptions, service)), timeout, rest
