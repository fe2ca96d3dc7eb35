"""What a model can be asked, wherever it runs: `LLM` and `Client` are Models, `LLM.aio` and `AsyncClient` are
AsyncModels.

One prompt gives one completion; a list gives a list in the same order. An item that fails doesn't end the others: when
all have ended, BatchError is raised, whose `results` has the outcome of each. With return_errors=True the list is
returned instead, with an error in place of each item that failed.

A subclass inherits `generate`, `chat` and `stream`, and implements what they call: `begin` (or `ask`) and `follow`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Literal, Protocol, TypeVar, Unpack, cast, overload

from isthmus.adapters import HasAdapters, HasAsyncAdapters
from isthmus.batches import Pending, ask_all, ask_all_async, progress_bar
from isthmus.errors import BatchError, RequestError
from isthmus.questions import (
    C,
    ChatOptions,
    EmbedOptions,
    GenerateOptions,
    P,
    ScoreOptions,
    StreamOptions,
    conversations_of,
    prompts_of,
    to_embed_question,
    to_question,
    to_score_question,
    to_streamed,
)
from isthmus.scores import Continuation, Embedding, EmbedQuestion, Score, ScoreQuestion
from isthmus.types import (
    AskOptions,
    Completion,
    Delta,
    Messages,
    Prompt,
    Question,
    SamplingParams,
    check_timeout,
)

R = TypeVar("R")


class Model(HasAdapters, Protocol):
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
    ) -> Completion | list[Completion] | list[Completion | RequestError]:
        """Continues a text or token ids. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (prompts := prompts_of(prompt)) is None:
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
    ) -> Completion | list[Completion] | list[Completion | RequestError]:
        """Answers a conversation, which the model's chat template writes as text. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (talks := conversations_of(messages)) is None:
            question = to_question(messages, sampling, options, arguments=template_arguments, chat=True)
            return self.begin(question, timeout).result()
        questions = [to_question(talk, sampling, options, arguments=template_arguments, chat=True) for talk in talks]
        return self._all(questions, timeout, progress, return_errors)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling: SamplingParams | None = None,
        **options: Unpack[StreamOptions],
    ) -> Generator[Delta, None, None]:
        """Continues a text or token ids, or answers a conversation, and yields the result as it comes. The last delta
        has the completion. Closing the generator ends the request. Raises RequestError, also between deltas."""
        asked, timeout = to_streamed(prompt, sampling, options)
        return self.follow(asked, timeout)

    @overload
    def score(
        self, prompt: Prompt | Messages, continuation: list[str], **options: Unpack[ScoreOptions]
    ) -> list[Score]: ...
    @overload
    def score(
        self, prompt: Prompt | Messages, continuation: list[list[int]], **options: Unpack[ScoreOptions]
    ) -> list[Score]: ...
    @overload
    def score(
        self, prompt: Prompt | Messages, continuation: Continuation, **options: Unpack[ScoreOptions]
    ) -> Score: ...
    def score(
        self,
        prompt: Prompt | Messages,
        continuation: Continuation | list[str] | list[list[int]],
        **options: Unpack[ScoreOptions],
    ) -> Score | list[Score]:
        """How likely a text, or each of a list of texts, is after a prompt, which is computed once. A text becomes
        tokens together with the prompt, unless a token would lie across the boundary; a space between them is the
        continuation's. Raises RequestError."""
        several = prompts_of(cast("Continuation | list[Continuation]", continuation))
        asked = [cast(Continuation, continuation)] if several is None else several
        question, timeout = to_score_question(prompt, asked, options)
        scores = self.begin_score(question, timeout).result()
        return scores[0] if several is None else scores

    @overload
    def embed(self, prompt: list[P], **options: Unpack[EmbedOptions]) -> list[Embedding]: ...
    @overload
    def embed(self, prompt: Prompt, **options: Unpack[EmbedOptions]) -> Embedding: ...
    def embed(self, prompt: Prompt | list[P], **options: Unpack[EmbedOptions]) -> Embedding | list[Embedding]:
        """The vector of a text, or of each of a list of texts, by the model's last hidden states after its final norm.
        Raises RequestError, and BatchError if items of a list fail."""
        if (several := prompts_of(prompt)) is None:
            question, timeout = to_embed_question(cast(Prompt, prompt), options)
            return self.begin_embed(question, timeout).result()
        asked = [to_embed_question(each, options) for each in several]
        with progress_bar(len(asked), None, "embedding") as tick:
            outcomes = ask_all(lambda one: self.begin_embed(*one), asked, self.at_once, tick)
        return results_of(outcomes)

    @abstractmethod
    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The token ids of a text, with those that the tokenizer adds, such as a first one. Raises RequestError."""

    @abstractmethod
    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises RequestError."""

    @abstractmethod
    def begin(self, question: Question, timeout: float | None = None) -> Pending[Completion]:
        """Starts a request without waiting for it. Raises RequestError if it is refused at once."""

    @abstractmethod
    def begin_score(self, question: ScoreQuestion, timeout: float | None = None) -> Pending[list[Score]]:
        """Starts to score continuations, as `begin` starts a request."""

    @abstractmethod
    def begin_embed(self, question: EmbedQuestion, timeout: float | None = None) -> Pending[Embedding]:
        """Starts to embed a text, as `begin` starts a request."""

    @abstractmethod
    def follow(self, question: Question, timeout: float | None = None) -> Generator[Delta, None, None]:
        """Yields the answer to a question as it comes, as `stream` does."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Most items of a list that are asked at once."""

    def _all(
        self, questions: Sequence[Question], timeout: float | None, progress: bool | None, return_errors: bool
    ) -> list[Completion] | list[Completion | RequestError]:
        with progress_bar(len(questions), progress, "generating") as tick:
            outcomes = ask_all(lambda one: self.begin(one, timeout), questions, self.at_once, tick)
        return outcomes if return_errors else results_of(outcomes)


class AsyncModel(HasAsyncAdapters, Protocol):
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
    ) -> Completion | list[Completion] | list[Completion | RequestError]:
        """Continues a text or token ids. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (prompts := prompts_of(prompt)) is None:
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
    ) -> Completion | list[Completion] | list[Completion | RequestError]:
        """Answers a conversation, which the model's chat template writes as text. Raises RequestError."""
        timeout = check_timeout(timeout)
        if (talks := conversations_of(messages)) is None:
            question = to_question(messages, sampling, options, arguments=template_arguments, chat=True)
            return await self.ask(question, timeout)
        questions = [to_question(talk, sampling, options, arguments=template_arguments, chat=True) for talk in talks]
        return await self._all(questions, timeout, progress, return_errors)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling: SamplingParams | None = None,
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[Delta, None]:
        """Continues a text or token ids, or answers a conversation, and yields the result as it comes. The last delta
        has the completion. Closing the generator ends the request. Raises RequestError, also between deltas."""
        asked, timeout = to_streamed(prompt, sampling, options)
        return self.follow(asked, timeout)

    @overload
    async def score(
        self, prompt: Prompt | Messages, continuation: list[str], **options: Unpack[ScoreOptions]
    ) -> list[Score]: ...
    @overload
    async def score(
        self, prompt: Prompt | Messages, continuation: list[list[int]], **options: Unpack[ScoreOptions]
    ) -> list[Score]: ...
    @overload
    async def score(
        self, prompt: Prompt | Messages, continuation: Continuation, **options: Unpack[ScoreOptions]
    ) -> Score: ...
    async def score(
        self,
        prompt: Prompt | Messages,
        continuation: Continuation | list[str] | list[list[int]],
        **options: Unpack[ScoreOptions],
    ) -> Score | list[Score]:
        """How likely a text, or each of a list of texts, is after a prompt, which is computed once. A text becomes
        tokens together with the prompt, unless a token would lie across the boundary; a space between them is the
        continuation's. Raises RequestError."""
        several = prompts_of(cast("Continuation | list[Continuation]", continuation))
        asked = [cast(Continuation, continuation)] if several is None else several
        question, timeout = to_score_question(prompt, asked, options)
        scores = await self.ask_score(question, timeout)
        return scores[0] if several is None else scores

    @overload
    async def embed(self, prompt: list[P], **options: Unpack[EmbedOptions]) -> list[Embedding]: ...
    @overload
    async def embed(self, prompt: Prompt, **options: Unpack[EmbedOptions]) -> Embedding: ...
    async def embed(self, prompt: Prompt | list[P], **options: Unpack[EmbedOptions]) -> Embedding | list[Embedding]:
        """The vector of a text, or of each of a list of texts, by the model's last hidden states after its final norm.
        Raises RequestError, and BatchError if items of a list fail."""
        if (several := prompts_of(prompt)) is None:
            question, timeout = to_embed_question(cast(Prompt, prompt), options)
            return await self.ask_embed(question, timeout)
        asked = [to_embed_question(each, options) for each in several]
        with progress_bar(len(asked), None, "embedding") as tick:
            outcomes = await ask_all_async(lambda one: self.ask_embed(*one), asked, self.at_once, tick)
        return results_of(outcomes)

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
    async def ask_score(self, question: ScoreQuestion, timeout: float | None = None) -> list[Score]:
        """Scores continuations. Raises RequestError."""

    @abstractmethod
    async def ask_embed(self, question: EmbedQuestion, timeout: float | None = None) -> Embedding:
        """Embeds a text. Raises RequestError."""

    @abstractmethod
    def follow(self, question: Question, timeout: float | None = None) -> AsyncGenerator[Delta, None]:
        """Yields the answer to a question as it comes, as `stream` does."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Most items of a list that are asked at once."""

    async def _all(
        self, questions: Sequence[Question], timeout: float | None, progress: bool | None, return_errors: bool
    ) -> list[Completion] | list[Completion | RequestError]:
        with progress_bar(len(questions), progress, "generating") as tick:
            outcomes = await ask_all_async(lambda one: self.ask(one, timeout), questions, self.at_once, tick)
        return outcomes if return_errors else results_of(outcomes)


def results_of(outcomes: Sequence[R | RequestError]) -> list[R]:
    """The outcomes if none is an error. Raises BatchError if one is."""
    results = [outcome for outcome in outcomes if not isinstance(outcome, RequestError)]
    if len(results) < len(outcomes):
        raise BatchError(outcomes)
    return results
