"""Turns documents into tokens, and says which tokens the model learns to write."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.text.added_tokens import FLAGS, declared_tokens
from isthmus.model.text.chat import ChatError, Span
from isthmus.model.text.tokenizer import TextError, Tokenizer, looks_special
from isthmus.model.weights.folder import ModelFolder
from isthmus.train.documents import Document

_log = logging.getLogger(__name__)


class Example(NamedTuple):
    """A document's tokens."""

    ids: list[int]
    weights: np.ndarray | None
    """uint8[tokens]: 1 where the token counts as a target; None means that every token does"""


class Encoder(Protocol):
    """Turns documents into the examples that the token files hold."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def weighted(self) -> bool:
        """Whether the examples have weights."""

    def __call__(self, documents: Sequence[Document]) -> list[Example]:
        """One example for each document. Raises ConfigError naming a document that can't be encoded."""


class _Texts:
    """Encodes texts. Warns once if a text spells out a special token that is taken for text."""

    def __init__(self, tokenizer: Tokenizer, parse_special: bool) -> None:
        self._tokenizer, self._parse_special, self._looks = tokenizer, parse_special, not parse_special

    def __call__(self, documents: Sequence[Document]) -> list[list[int]]:
        for document in documents:
            if self._looks and (spelt := looks_special(document.text)) is not None:
                self._looks = self._tokenizer.token_id(spelt) not in self._tokenizer.special_ids
                if not self._looks:
                    _log.warning(
                        "data: %s spells %s, which is taken for text; if the special token is meant: "
                        "--text.parse-special, or conversations as messages",
                        document.name,
                        spelt,
                    )
        with _named(documents):
            texts = [document.text for document in documents]
            return self._tokenizer.encode_batch(texts, parse_special=self._parse_special)


@contextmanager
def _named(documents: Sequence[Document]) -> Iterator[None]:
    """Turns the tokenizer's TextError, which names no document, into a ConfigError that names the documents."""
    try:
        yield
    except TextError as error:
        raise ConfigError(f"data: a document from {documents[0].name} to {documents[-1].name}: {error}") from None


class Pretraining:
    """Encodes texts with one end-of-text token between two of them, which as a target teaches where a text ends.

    If the tokenizer puts that token before every prompt, it comes before each text; otherwise it comes after each text.
    So a text always begins as a prompt does.
    """

    weighted = False

    def __init__(self, tokenizer: Tokenizer, parse_special: bool = False) -> None:
        assert tokenizer.eos_id is not None
        self._encode, self._end, self.vocab_size = (
            _Texts(tokenizer, parse_special),
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )
        self._parted = self._end in tokenizer.encode("")

    def __call__(self, documents: Sequence[Document]) -> list[Example]:
        assert all(document.kind == "text" for document in documents)
        encoded = self._encode(documents)
        parted = [ids if self._parted or ids[-1:] == [self._end] else [*ids, self._end] for ids in encoded]
        return [Example(ids, None) for ids in parted]


class FineTuning:
    """Encodes documents as the folder's model reads them. A text begins with what the tokenizer puts before it and ends
    with the end token. A conversation is written by the chat template, and only the assistant's answers are targets.
    The first token of a document never is one."""

    weighted = True

    def __init__(self, folder: ModelFolder, parse_special: bool = False) -> None:
        """Raises ConfigError when the folder doesn't say what ends a text."""
        if folder.end_id is None:
            raise ConfigError(f"init: {folder.path} doesn't say which token ends a text (eos_token_id)")
        self._folder, self._end, self.vocab_size = folder, folder.end_id, folder.config.vocab_size
        self._encode_texts = _Texts(folder.tokenizer, parse_special)

    @cached_property
    def stamp(self) -> list[str | int]:
        """A list that changes whenever the same documents would become other tokens."""
        chat = self._folder.chat
        template = None if chat is None else [chat.source, sorted(chat.special_tokens.items())]
        declared = [
            (token.content, *(getattr(token, flag) for flag in FLAGS), promotes)
            for token, promotes in declared_tokens(self._folder.path)
        ]
        settings = [template, declared]
        parts = [(self._folder.path / "tokenizer.json").read_bytes(), json.dumps(settings).encode()]
        return [
            *(hashlib.sha256(part).hexdigest() for part in parts),
            self._end,
            *sorted(self._folder.tokenizer.eos_ids),
        ]

    def __call__(self, documents: Sequence[Document]) -> list[Example]:
        made: dict[int, Example] = {}
        of_kind = {
            kind: [index for index, document in enumerate(documents) if document.kind == kind]
            for kind in ("text", "messages")
        }
        for kind, encode in (("text", self._texts), ("messages", self._conversations)):
            made |= zip(of_kind[kind], encode([documents[index] for index in of_kind[kind]]), strict=True)
        examples = [made[index] for index in range(len(documents))]
        for document, example in zip(documents, examples, strict=True):
            if (most := max(example.ids, default=0)) >= self.vocab_size:
                raise ConfigError(
                    f"data: {document.name} holds token {most}, and the model in {self._folder.path} has only "
                    f"{self.vocab_size} ids"
                )
        return examples

    def _texts(self, documents: Sequence[Document]) -> list[Example]:
        examples = []
        for ids in self._encode_texts(documents):
            ids = ids if ids[-1:] == [self._end] else [*ids, self._end]
            weights = np.ones(len(ids), np.uint8)
            weights[0] = 0
            examples.append(Example(ids, weights))
        return examples

    def _conversations(self, documents: Sequence[Document]) -> list[Example]:
        rendered = [self._render(document) for document in documents]
        with _named(documents):
            encoded = self._folder.tokenizer.encode_chat_batch([text for text, _ in rendered])
        return [
            Example(ids, self._answers(ids, extents, spans))
            for (ids, extents), (_, spans) in zip(encoded, rendered, strict=True)
        ]

    def _render(self, document: Document) -> tuple[str, list[Span]]:
        if self._folder.chat is None:
            raise ConfigError(f"data: {document.name} holds messages, and {self._folder.path} has no chat template")
        fields = json.loads(document.text)
        arguments = {name: value for name, value in fields.items() if name != "messages"}
        try:
            return self._folder.chat.render_with_assistant_spans(fields["messages"], arguments=arguments)
        except ChatError as error:
            raise ConfigError(f"data: {document.name}: {error}") from None

    def _answers(self, ids: list[int], extents: list[Span], spans: list[Span]) -> np.ndarray:
        """uint8[tokens]: 1 for tokens of what the assistant said, up to the one that ends its turn."""
        weights = np.zeros(len(ids), np.uint8)
        starts, ends = np.asarray(extents, np.int64).reshape(-1, 2).T
        stops = np.isin(ids, list(self._folder.tokenizer.eos_ids))
        for start, end in spans:
            inside = np.flatnonzero((starts < end) & (ends > start))
            stopped = inside[stops[inside]]
            # After that token many templates put a newline, which the model never writes because it has stopped.
            weights[inside if not len(stopped) else inside[inside <= stopped[-1]]] = 1
        weights[:1] = 0
        return weights
