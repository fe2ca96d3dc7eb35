"""Turns a question into the engine's Request, with every check, in one place that all front ends share. Errors name the
library's argument (isthmus/types.py); a front end whose fields have other names renames it."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from isthmus.arguments import check_flag, check_int, check_within
from isthmus.errors import InvalidRequest, ModelNotFound
from isthmus.forms import check_string
from isthmus.model.text.chat import ChatError, ChatTemplate
from isthmus.model.text.stops import MAX_STOP_CHARACTERS, MAX_STOPS, StopStrings
from isthmus.model.text.tokenizer import TextError, Tokenizer, TooManyTokens
from isthmus.model.weights.folder import GenerationDefaults, ModelFolder
from isthmus.serve.engine.adapters import Resident
from isthmus.serve.engine.constraint import Constraint, ConstraintError
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.prepare.answer import TextOptions
from isthmus.serve.prepare.checks import check_text, check_token_ids
from isthmus.serve.prepare.grammar import Grammars
from isthmus.serve.prepare.sampling import Drawing, drawing_of
from isthmus.types import (
    NO_LIMIT,
    Conversation,
    Question,
    SamplingParams,
    Service,
    TextPrompt,
    TokenPrompt,
    check_cache,
    check_priority,
    check_prompt,
    check_sized,
    check_stops,
    check_turns,
)

MAX_REQUEST_ID = 128
"""Most characters of a request's id"""
MAX_SALT = 256
"""Most characters of a request's cache_salt"""
MAX_CHOICES = 128
"""Most requests that one question makes"""
MAX_TOKENS = 1 << 18
"""Most tokens of a text that `tokenized` or `detokenized` takes, and of a prompt that is truncated, unless the
context has room for more: they would hold up all streams while they become a list"""
MAX_CHARACTERS = 4_000_000
"""Most characters of a text that `detokenized` returns, and of the texts that are encoded to score continuations, each
of which has the prompt before it"""


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
    grammars: Grammars | None = None
    """Compiles what a text must be, and keeps it for the next question; None refuses to"""
    name: str = ""
    """The model's name"""
    embedding_size: int = 0
    """Numbers of a hidden state"""
    room: int = MAX_CHOICES
    """Requests that the engine takes at once"""
    adapters: Mapping[str, Resident] = field(default_factory=dict)
    """The adapters that the model is served with, by the names that questions call them"""

    @classmethod
    def of(cls, model: ModelFolder, engine: Engine) -> Preparation:
        """The preparation for a model in an engine."""
        config = model.config
        grammars = Grammars(model.tokenizer, config.vocab_size)
        return cls(
            model.tokenizer,
            model.chat,
            model.generation,
            engine.config.context_length,
            grammars,
            model.name,
            config.dim,
            engine.config.max_sequences + engine.config.max_waiting,
            engine.adapters,
        )

    def check_count(self, field: str, count: int) -> int:
        """Returns how many requests one question makes. Raises InvalidRequest for what can never be in the engine."""
        most = min(MAX_CHOICES, self.room)
        if not 1 <= count <= most:
            why = ", which is all that engine.max_sequences and engine.max_waiting have room for" * (most == self.room)
            raise InvalidRequest(field, f"makes {count} requests; it must make 1 to {most}{why}")
        return count

    def requests(self, question: Question, *, tenant: str = "", deadline: float | None = None) -> list[Request]:
        """The engine's requests for a question, one for each completion, the arguments as for `request`. The first has
        the question's seed, and each other one more than the one before it. They share the pages of the prompt."""
        count = self.check_count("n", check_int("n", question.sampling.n))
        first = self.request(question, tenant=tenant, deadline=deadline)
        if count == 1:
            return [first]
        if first.resumed:
            raise InvalidRequest("resume_token_ids", "are of one completion: ask for each by itself, with its own seed")
        options = dataclasses.replace(first.text_options, prompt_logprobs=None)
        other = dataclasses.replace(first, scored_from=None, text_options=options)  # the first tells of the prompt
        return sharing([first, *(_with_seed(other, first.sampling.seed + index) for index in range(1, count))])

    def request(self, question: Question, *, tenant: str = "", deadline: float | None = None) -> Request:
        """The engine's request for a question. Raises InvalidRequest. `Engine.submit` checks the rest.

        tenant: who asks. Tenants share the engine, and never what the prefix cache has. deadline: when the caller stops
        waiting, on the clock of time.perf_counter.
        """
        asked = question.sampling
        plain = self.plain(question.request_id, question.service, tenant=tenant, deadline=deadline)
        prompt = self.prompt_ids(question.prompt, self.kept_tokens(asked.truncate_prompt_tokens))
        left = self.context_length - len(prompt)
        drawing = drawing_of(asked, self.recommended, self.tokenizer, left)
        resumed, constraint = self._resumed(asked, drawing), self._constraint(asked)
        if resumed and constraint is not None:
            _check_fits(constraint.copy(), resumed)
        return dataclasses.replace(
            plain,
            prompt=prompt,
            sampling=drawing.sampling,
            max_tokens=drawing.max_tokens,
            stop_ids=drawing.stop_ids,
            eos_ids=drawing.eos_ids,
            resumed=resumed,
            scored_from=1 if asked.prompt_logprobs is not None and len(prompt) > 1 else None,
            constraint=constraint,
            text_options=self._text_options(asked),
            predicted=self._predicted(question.service.predicted_text),
        )

    def plain(self, request_id: str, service: Service, *, tenant: str, deadline: float | None) -> Request:
        """A request that is served so, for a prompt that is still to be said, and draws nothing. tenant, deadline: as
        for `request`. Raises InvalidRequest."""
        cache = check_cache(service.cache)
        return Request(
            id=_request_id(request_id),
            prompt=(),
            sampling=Sampling(),
            max_tokens=0,
            adapter=self._adapter(service.model),
            tenant=tenant,
            priority=check_priority(service.priority),
            deadline=deadline,
            max_queue_time=_limit(service.max_queue_time),
            cache_salt=_salt(tenant, service.cache_salt),
            cache_read=cache in ("on", "read"),
            cache_write=cache in ("on", "write"),
        )

    def _adapter(self, asked: str) -> Resident | None:
        """The adapter of that name; None where it is the model's."""
        if check_string("model", asked) in ("", self.name):
            return None
        if (adapter := self.adapters.get(asked)) is None:
            with_those = f" with the adapters {', '.join(map(repr, self.adapters))}" if self.adapters else ""
            raise ModelNotFound("model", f"{asked!r:.160} is not here; this is {self.name!r}{with_those:.800}")
        return adapter

    def _predicted(self, text: str) -> list[int]:
        most = self.tokenizer.most_characters(self.context_length)
        if not check_string("predicted_text", text):
            return []
        try:
            return self.tokenizer.encode_part(text[:most])[: self.context_length]
        except TextError as error:
            raise InvalidRequest("predicted_text", str(error)) from None

    def _resumed(self, asked: SamplingParams, drawing: Drawing) -> list[int]:
        given = check_sized("resume_token_ids", asked.resume_token_ids)
        if len(given) > self.context_length:
            raise InvalidRequest("resume_token_ids", f"has {len(given)} ids; the context holds {self.context_length}")
        ids: list[int] = check_token_ids("resume_token_ids", given, self.tokenizer.vocab_size).tolist()
        if ids and asked.seed is None and drawing.sampling.temperature > 0:
            raise InvalidRequest("seed", "must be given with resume_token_ids, and be that of the answer they are of")
        ends = drawing.stop_ids | drawing.eos_ids
        for index, token in enumerate(ids):
            if token in ends:
                raise InvalidRequest(f"resume_token_ids[{index}]", f"{token} ends the text: nothing is left to resume")
        return ids

    def _constraint(self, asked: SamplingParams) -> Constraint | None:
        if asked.response_format is None:
            return None
        if asked.ignore_eos:
            raise InvalidRequest("ignore_eos", "goes on past the end that the form of the text has")
        if self.grammars is None:
            raise InvalidRequest("response_format", "this model is served without forms of text")
        return self.grammars.constraint(asked.response_format)

    def prompt_ids(
        self, prompt: TextPrompt | TokenPrompt | Conversation, last: int | None = None, *, room: int = 1
    ) -> list[int]:
        """Token ids of the prompt. last: how many of its last ones to keep; with None, all must fit into the context,
        with `room` for more. Raises InvalidRequest; a text that can't fit is refused before it is encoded."""
        most = self.context_length - room
        if last is not None:
            most = max(most, MAX_TOKENS)
        match prompt:
            case Conversation():
                ids = self._encoded("messages", self._rendered(prompt), self.tokenizer.encode_chat, most)
            case TextPrompt():
                parsed = check_flag("parse_special", prompt.parse_special)
                encode = partial(self.tokenizer.encode, parse_special=parsed)
                ids = self._encoded("prompt", check_text("prompt", prompt.text), encode, most)
            case TokenPrompt():
                ids = self._given(prompt.ids, most)
        return ids if last is None else ids[-last:]

    def continued(
        self, prompt: TextPrompt | Conversation, texts: Mapping[str, str], last: int | None
    ) -> tuple[list[int], list[list[int]]]:
        """The token ids of a prompt, and of each text that may follow it. They are those of both as one text, unless a
        token lies across the boundary: then each is encoded by itself. texts: by the names of their fields. last: as in
        `prompt_ids`. Raises InvalidRequest."""
        most = self.context_length if last is None else max(self.context_length, MAX_TOKENS)
        if isinstance(prompt, Conversation):
            field, text, encode = "messages", self._rendered(prompt), self.tokenizer.encode_chat
        else:
            field, text = "prompt", check_text("prompt", prompt.text)
            encode = partial(self.tokenizer.encode, parse_special=check_flag("parse_special", prompt.parse_special))
        if (total := sum(len(text) + len(more) for more in texts.values())) > MAX_CHARACTERS:
            raise InvalidRequest(
                "continuations",
                f"have {total} characters, each with the prompt before it; at most {MAX_CHARACTERS} are taken at once",
            )
        before, after = self._encoded(field, text, encode, most), []
        for name, more in texts.items():
            ids = self._encoded(name, text + more, encode, most + self.context_length)
            fits = ids[: len(before)] == before
            after.append(ids[len(before) :] if fits else self.tokenizer.encode_part(more))
        return before if last is None else before[-last:], after

    def kept_tokens(self, last: int | None) -> int | None:
        """How many of a prompt's last tokens are kept; None is all."""
        if last is None:
            return None
        last = check_int("truncate_prompt_tokens", last)
        if not 1 <= last < self.context_length:
            raise InvalidRequest("truncate_prompt_tokens", f"must be 1 to {self.context_length - 1}, not {last}")
        return last

    def _given(self, ids: Sequence[int], most: int) -> list[int]:
        if not len(check_prompt(ids)):
            raise InvalidRequest("prompt", "must not be empty")
        if len(ids) > most:
            raise self._too_long("prompt", len(ids), most)
        return check_token_ids("prompt", ids, self.tokenizer.vocab_size).tolist()

    def _encoded(self, field: str, text: str, encode: Callable[[str, int], list[int]], most: int) -> list[int]:
        characters = self.tokenizer.most_characters(most + 1)
        if len(text) > characters:
            raise InvalidRequest(field, f"has {len(text)} characters; {most} tokens have at most {characters}")
        try:
            ids = encode(text, most)
        except TooManyTokens as error:
            raise self._too_long(field, error.counted, most) from None
        except TextError as error:
            raise InvalidRequest(field, str(error)) from None
        if max(ids, default=0) >= self.tokenizer.vocab_size:
            raise InvalidRequest(field, f"spells the token {max(ids)}, which the model has no embedding for")
        return ids

    def _too_long(self, field: str, tokens: int | str, most: int) -> InvalidRequest:
        if most == self.context_length:
            return InvalidRequest(field, f"has {tokens} tokens; the context holds {most}")
        if most > self.context_length:
            return InvalidRequest(field, f"has {tokens} tokens; at most {most} can be truncated")
        return InvalidRequest(
            field,
            f"has {tokens} tokens; the context of {self.context_length} needs room for one more. "
            "truncate_prompt_tokens keeps the last ones",
        )

    def _rendered(self, conversation: Conversation) -> str:
        """The conversation as the model's template writes it. Raises InvalidRequest."""
        if self.chat is None:
            raise InvalidRequest(
                "chat_template", "this model has no chat template: give it a text or token ids instead of messages"
            )
        turns = check_turns(conversation.messages)
        try:
            text = self.chat.render(turns, arguments=conversation.template_arguments)
        except ChatError as error:
            raise InvalidRequest("chat_template", str(error)) from None
        if not text:
            raise InvalidRequest("chat_template", "the chat template writes nothing for these messages")
        return text

    def _text_options(self, asked: SamplingParams) -> TextOptions:
        strings = _stops(asked.stop)
        if not strings and not asked.ignore_eos:
            strings = self.recommended.stop_strings
        return TextOptions(
            StopStrings(strings) if strings else None,
            include_stop=check_flag("include_stop", asked.include_stop),
            keep_special=not check_flag("skip_special_tokens", asked.skip_special_tokens),
            logprobs=asked.logprobs,
            prompt_logprobs=asked.prompt_logprobs,
        )


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


def _stops(given: str | Sequence[str]) -> tuple[str, ...]:
    strings = check_stops(given)
    if len(strings) > MAX_STOPS:
        raise InvalidRequest("stop", f"has {len(strings)} strings; at most {MAX_STOPS}")
    for index, string in enumerate(strings):
        if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(f"stop[{index}]", f"has {len(string)} characters; give 1 to {MAX_STOP_CHARACTERS}")
    return strings


def sharing(requests: Sequence[Request]) -> list[Request]:
    """A caller's requests, made so that they share pages: with each other alone, if they may use no others."""
    if len(requests) == 1 or requests[0].cache_read or requests[0].cache_write:
        return list(requests)
    salt = requests[0].cache_salt + secrets.token_bytes(16)
    return [dataclasses.replace(one, cache_salt=salt, cache_read=True, cache_write=True) for one in requests]


def _check_fits(constraint: Constraint, resumed: Sequence[int]) -> None:
    """Raises InvalidRequest for the first token that a constraint doesn't allow, and for tokens after which it allows
    none. It goes on by them, which takes about 5 µs each."""
    for index, token in enumerate(resumed):
        if constraint.done:
            raise InvalidRequest(f"resume_token_ids[{index}]", "comes after all that the form of the text allows")
        try:
            constraint.accept(token)
        except ConstraintError:
            raise InvalidRequest(f"resume_token_ids[{index}]", f"{token} leads to no text of this form") from None
    if constraint.done:
        raise InvalidRequest("resume_token_ids", "are all of a text of this form: nothing is left to resume")


def _with_seed(request: Request, seed: int) -> Request:
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed % (1 << 64)))


def _request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID or not given.isprintable():
        raise InvalidRequest("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")
    return given or secrets.token_hex(8)


def _limit(seconds: float | None) -> float | None:
    if seconds is None:
        return None
    return float(check_within("max_queue_time", seconds, 0, NO_LIMIT, open_low=True))


def _salt(tenant: str, given: str) -> bytes:
    """What only a tenant's requests with the same cache_salt have in common: no salt that one tenant can give leads to
    another's pages."""
    if len(check_string("cache_salt", given)) > MAX_SALT:
        raise InvalidRequest("cache_salt", f"has {len(given)} characters; at most {MAX_SALT}")
    return hashlib.sha256(tenant.encode()).digest() + given.encode()
