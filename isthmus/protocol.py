"""What a model can be asked, wherever it runs: `LLM` and `Client` are Models, `LLM.aio` and `AsyncClient` are
AsyncModels.

One prompt gives one completion; a list gives a list in the same order. An item that fails doesn't end the others: when
all have ended, BatchError is raised, whose `results` has the outcome of each. With return_errors=True the list is
returned instead, with an error in place of each item that failed.

A subclass inherits `generate`, `chat` and `stream`, and implements what they call: `begin` (or `ask`) and `follow`.
"""

from __future__ import annotations

import numbers
from abc import abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Literal, Protocol, TypeVar, Unpack, cast, overload

from isthmus.batches import Outcome, Pending, ask_all, ask_all_async, progress_bar
from isthmus.errors import BatchError, InvalidRequest, RequestError
from isthmus.types import (
    AskOptions,
    Completion,
    Conversation,
    Delta,
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


class StreamOptions(AskOptions, total=False):
    """Keywords of `stream`, which mean what they do for `generate` and `chat`."""

    timeout: float | None
    parse_special: bool
    template_arguments: Mapping[str, object]


class Model(Protocol):
    """A model with synchronous calls. Safe to use from several threads."""

    @overload
    def generate(
        self,
        prompt: list[P],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompt: list[P],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> list[Completion | RequestError]: ...
    @overload
    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion: ...
    def generate(
        self,
        prompt: Prompt | list[P],
        sampling: SamplingParams | None = None,
        *,
        return_errors: bool = False,
        parse_special: bool = False,
        timeout: float | None = None,
        progress: bool | None = None,
        **options: Unpack[AskOptions],
    ) -> Completion | list[Completion] | list[Outcome]:
        """Continues a text or token ids. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (prompts := _prompts(prompt)) is None:
            return self.begin(to_question(cast(Prompt, prompt), sampling, options, parse_special), timeout).result()
        questions = [to_question(one, sampling, options, parse_special) for one in prompts]
        return self._all(questions, timeout, progress, return_errors)

    @overload
    def chat(
        self,
        messages: list[C],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]: ...
    @overload
    def chat(
        self,
        messages: list[C],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> list[Completion | RequestError]: ...
    @overload
    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> Completion: ...
    def chat(
        self,
        messages: Messages | list[C],
        sampling: SamplingParams | None = None,
        *,
        return_errors: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        timeout: float | None = None,
        progress: bool | None = None,
        **options: Unpack[AskOptions],
    ) -> Completion | list[Completion] | list[Outcome]:
        """Answers a conversation, which the model's chat template writes as text. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (talks := _conversations(messages)) is None:
            talk = _talk(messages)
            return self.begin(to_question(talk, sampling, options, arguments=template_arguments), timeout).result()
        questions = [to_question(talk, sampling, options, arguments=template_arguments) for talk in map(_talk, talks)]
        return self._all(questions, timeout, progress, return_errors)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling: SamplingParams | None = None,
        **options: Unpack[StreamOptions],
    ) -> Generator[Delta, None, None]:
        """Continues a text or token ids, or answers a conversation, and yields the result as it comes. The last delta
        has the completion. Closing the generator ends the request. Raises RequestError, also between deltas."""
        asked, timeout = streamed(prompt, sampling, options)
        return self.follow(asked, timeout)

    @abstractmethod
    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The token ids of a text, with those that the tokenizer adds, such as a first one. Raises RequestError."""

    @abstractmethod
    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises RequestError."""

    @abstractmethod
    def begin(self, question: Question, timeout: float | None = None) -> Pending:
        """Starts a request without waiting for it. Raises RequestError if it is refused at once."""

    @abstractmethod
    def follow(self, question: Question, timeout: float | None = None) -> Generator[Delta, None, None]:
        """Yields the answer to a question as it comes, as `stream` does."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Most items of a list that are asked at once."""

    def _all(
        self, questions: Sequence[Question], timeout: float | None, progress: bool | None, return_errors: bool
    ) -> list[Completion] | list[Outcome]:
        with progress_bar(len(questions), progress) as tick:
            outcomes = ask_all(lambda one: self.begin(one, timeout), questions, self.at_once, tick)
        return outcomes if return_errors else _completions(outcomes)


class AsyncModel(Protocol):
    """A model with calls for asyncio. Cancelling the task that waits for a call ends its request."""

    @overload
    async def generate(
        self,
        prompt: list[P],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...
    @overload
    async def generate(
        self,
        prompt: list[P],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> list[Completion | RequestError]: ...
    @overload
    async def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion: ...
    async def generate(
        self,
        prompt: Prompt | list[P],
        sampling: SamplingParams | None = None,
        *,
        return_errors: bool = False,
        parse_special: bool = False,
        timeout: float | None = None,
        progress: bool | None = None,
        **options: Unpack[AskOptions],
    ) -> Completion | list[Completion] | list[Outcome]:
        """Continues a text or token ids. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (prompts := _prompts(prompt)) is None:
            return await self.ask(to_question(cast(Prompt, prompt), sampling, options, parse_special), timeout)
        questions = [to_question(one, sampling, options, parse_special) for one in prompts]
        return await self._all(questions, timeout, progress, return_errors)

    @overload
    async def chat(
        self,
        messages: list[C],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]: ...
    @overload
    async def chat(
        self,
        messages: list[C],
        sampling: SamplingParams | None = None,
        *,
        return_errors: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> list[Completion | RequestError]: ...
    @overload
    async def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> Completion: ...
    async def chat(
        self,
        messages: Messages | list[C],
        sampling: SamplingParams | None = None,
        *,
        return_errors: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        timeout: float | None = None,
        progress: bool | None = None,
        **options: Unpack[AskOptions],
    ) -> Completion | list[Completion] | list[Outcome]:
        """Answers a conversation, which the model's chat template writes as text. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (talks := _conversations(messages)) is None:
            talk = _talk(messages)
            return await self.ask(to_question(talk, sampling, options, arguments=template_arguments), timeout)
        questions = [to_question(talk, sampling, options, arguments=template_arguments) for talk in map(_talk, talks)]
        return await self._all(questions, timeout, progress, return_errors)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling: SamplingParams | None = None,
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[Delta, None]:
        """Continues a text or token ids, or answers a conversation, and yields the result as it comes. The last delta
        has the completion. Closing the generator ends the request. Raises RequestError, also between deltas."""
        asked, timeout = streamed(prompt, sampling, options)
        return self.follow(asked, timeout)

    @abstractmethod
    async def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The token ids of a text, with those that the tokenizer adds, such as a first one. Raises RequestError."""

    @abstractmethod
    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises RequestError."""

    @abstractmethod
    async def ask(self, question: Question, timeout: float | None = None) -> Completion:
        """Answers one question. Raises RequestError."""

    @abstractmethod
    def follow(self, question: Question, timeout: float | None = None) -> AsyncGenerator[Delta, None]:
        """Yields the answer to a question as it comes, as `stream` does."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Most items of a list that are asked at once."""

    async def _all(
        self, questions: Sequence[Question], timeout: float | None, progress: bool | None, return_errors: bool
    ) -> list[Completion] | list[Outcome]:
        with progress_bar(len(questions), progress) as tick:
            outcomes = await ask_all_async(lambda one: self.ask(one, timeout), questions, self.at_once, tick)
        return outcomes if return_errors else _completions(outcomes)


# From arguments to questions


def to_question(
    prompt: Prompt | Messages,
    sampling: SamplingParams | None,
    options: AskOptions,
    parse_special: bool = False,
    arguments: Mapping[str, object] | None = None,
) -> Question:
    """The question that the arguments of a call ask. Raises TypeError for an unknown option and for sampling that isn't
    SamplingParams, and InvalidRequest for an option that doesn't go with the prompt."""
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling must be SamplingParams, not {type(sampling).__name__}")
    service = {name: value for name, value in options.items() if name in ServiceOptions.__annotations__}
    drawn = {name: value for name, value in options.items() if name not in service}
    asked = (sampling or SamplingParams()).replace(**cast(SamplingOptions, drawn))
    if isinstance(prompt, str):
        kind: TextPrompt | TokenPrompt | Conversation = TextPrompt(prompt, parse_special)
    elif _is_conversation(prompt):
        kind = Conversation(cast(Messages, prompt), arguments or {})
    elif isinstance(prompt, Mapping):
        raise TypeError("a message is not a prompt: give chat a list of messages")
    else:
        kind = TokenPrompt(cast(Sequence[int], prompt))
    if parse_special and not isinstance(kind, TextPrompt):
        raise InvalidRequest("parse_special", "is for a text only: in messages a special token is always read as one")
    if arguments is not None and not isinstance(kind, Conversation):
        raise InvalidRequest("template_arguments", "are for messages only")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise InvalidRequest("template_arguments", f"must be a mapping, not {type(arguments).__name__}")
    return Question(kind, asked, service=Service(**cast(ServiceOptions, service)))


def streamed(
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


def _is_conversation(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _prompts(prompt: Prompt | list[P]) -> list[P] | None:
    """The prompt as a list of prompts; None if it is a single one. A list of numbers is one prompt, of token ids."""
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], numbers.Integral)):
        return cast("list[P]", prompt)
    return None


def _conversations(messages: Messages | list[C]) -> list[C] | None:
    """The messages as a list of conversations; None if they are a single one."""
    if isinstance(messages, list) and not _is_conversation(messages):
        return cast("list[C]", messages)
    return None


def _talk(messages: object) -> Messages:
    """The messages as a conversation. Raises TypeError if they aren't one."""
    if not _is_conversation(messages):
        raise TypeError(f"a conversation is a list of messages with role and content, not {type(messages).__name__}")
    return cast(Messages, messages)


def _completions(outcomes: list[Outcome]) -> list[Completion]:
    """The outcomes as completions. Raises BatchError if one is an error."""
    completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
    if len(completions) < len(outcomes):
        raise BatchError(outcomes)
    return completions
