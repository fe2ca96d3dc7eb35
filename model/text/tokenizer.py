"""The tokenizer beside a checkpoint (`tokenizer.json`), and training a new one: byte-level BPE."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as _Tokenizer

from isthmus.errors import ConfigError
from isthmus.model.text.text_stream import Detokenizer, TextStream
from isthmus.model.text.tokenizer_file import examine

END_OF_TEXT = "<|endoftext|>"
"""Starts every document in training and every prompt in serving; drawing it ends the sequence."""

NORMALIZED = 4
"""Most characters that Unicode's normal forms combine into one"""


class TooManyTokens(ValueError):
    """A text has more tokens than are allowed."""

    def __init__(self, count: int, most: int, *, whole: bool = True) -> None:
        """whole: whether the whole text was counted; if not, it has at least `count` tokens."""
        self.count, self.counted = count, f"{count}" if whole else f"at least {count}"
        super().__init__(f"has {self.counted} tokens; at most {most}")


MAX_WORK = 256 << 20
"""Limit for the characters of a prompt times the growth that its tokenizer may cause"""

PART = 256 << 10
"""Most characters that are encoded at once while it isn't known how many tokens they have"""
_PER_CUT = 64
"""Tokens that cutting a text into parts may add per cut, estimated generously"""

_SPECIAL = re.compile(
    r"<\|[^\s<>|]{1,64}\|>|<\uff5c[^\s<>\uff5c]{1,64}\uff5c>|<(?:bos|eos|start_of_turn|end_of_turn)>|</?s>|\[/?INST\]"
)


def looks_special(text: str) -> str | None:
    """The first part of `text` that is written like a special token of some family, or None. It is for warnings, and
    asks no tokenizer."""
    found = _SPECIAL.search(text)
    return None if found is None else found[0]


class TextError(ValueError):
    """The tokenizer doesn't accept a text; the message says why."""


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, inner: _Tokenizer, *, vocab_size: int | None = None, growth: int = 1) -> None:
        """vocab_size: the highest id plus one; None looks for it. growth: the most bytes that one byte of text may
        become before the text is cut into tokens."""
        inner.encode_special_tokens = True  # a prompt that spells out a special token is text
        _without_settings(inner)
        self._inner = inner
        self._growth = growth
        self.vocab_size: int = _highest_id(inner) + 1 if vocab_size is None else vocab_size
        self.eos_id: int | None = inner.token_to_id(END_OF_TEXT)
        self.eos_ids = frozenset() if self.eos_id is None else frozenset({self.eos_id})
        """Drawing one of these ids ends a text"""

    @classmethod
    def load(cls, path: Path, declared: Sequence[tuple[AddedToken, bool]] = ()) -> Tokenizer:
        """Reads a Hugging Face `tokenizer.json`. Raises ConfigError when it isn't one, or isn't safe to use.

        Its settings for truncation, padding and dropout are for training, and are ignored. declared: tokens of the
        vocabulary that become one token wherever they are spelt out, each with whether it becomes special even if the
        file says otherwise.
        """
        found = examine(path)
        try:
            with _typed_errors():
                inner = _Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer: {error}") from None
        for token, index in found.added:
            if (given := inner.token_to_id(token)) != index:
                raise ConfigError(
                    f"{path}: the added token {token!r} can't have the id {index}: added tokens are numbered on from "
                    f"the model's vocabulary, so it gets {given}. List it in model.vocab too"
                )
        _declare(inner, declared)
        return cls(inner, vocab_size=found.vocab_size, growth=found.growth)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-level BPE: it can encode every string, and decoding gives back the same bytes.

        Raises ConfigError when vocab_size has no room for the 256 bytes and the end-of-text token.
        """
        if vocab_size < 257:
            raise ConfigError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and the end-of-text token")
        inner = _Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[END_OF_TEXT],
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            ),
        )
        inner.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, inner.token_to_id(END_OF_TEXT))]
        )
        return cls(inner)

    def save(self, path: Path) -> None:
        path.write_text(self._inner.to_str(pretty=True), encoding="utf-8")

    def spec(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""
        found: dict[str, Any] = json.loads(self._inner.to_str())
        return found

    def encode(self, text: str, most: int | None = None, *, parse_special: bool = False) -> list[int]:
        """Token ids, with those that the tokenizer puts around a prompt.

        parse_special: whether a special token that is spelt out in the text is that token; otherwise it is text. Other
        threads can run meanwhile, until the list of ids is made. Raises TooManyTokens before that, if there are more
        than `most`, and TextError.
        """
        return self._encode(self._with_special_tokens if parse_special else self._inner, text, most)

    def encode_part(self, text: str) -> list[int]:
        """Token ids of a text as it is inside of another: nothing is put around it, and nothing in it is special. A
        tokenizer that begins every text with a space does so here. Raises TextError."""
        return self._encode(self._inner, text, None, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[list[int]]:
        """The token ids of several texts, encoded in parallel, each as by `encode`. Raises TextError."""
        inner = self._with_special_tokens if parse_special else self._inner
        with _typed_errors():
            return [encoding.ids for encoding in inner.encode_batch_fast(list(texts))]

    def encode_chat(self, text: str, most: int | None = None) -> list[int]:
        """Token ids of a rendered chat template: special tokens spelt out in it are special, and no tokens are added.

        `most`, and the errors raised, are as in encode.
        """
        return self._encode(self._with_special_tokens, text, most, add_special_tokens=False)

    def _encode(self, inner: _Tokenizer, text: str, most: int | None, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) * self._growth > MAX_WORK:
            raise TextError(f"has {len(text)} characters; this model's tokenizer takes {MAX_WORK // self._growth}")
        with _typed_errors():
            if most is not None:
                _count_parts(inner, text, most)
            return _ids(inner.encode_batch_fast([text], add_special_tokens=add_special_tokens), most)

    def encode_chat_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encodes several rendered chat templates in parallel, each as by `encode_chat`. Returns the ids of each text,
        and which of its characters each token stands for.

        These extents [start, end) tile the text, except that if a character is cut into several tokens, each of them
        has the whole character.
        """
        with _typed_errors():
            encoded = self._with_special_tokens.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, _extents(encoding.offsets)) for encoding in encoded]

    @cached_property
    def _with_special_tokens(self) -> _Tokenizer:
        """A tokenizer that reads special tokens and shares the vocabulary. It exists because encode_special_tokens is a
        setting of a whole tokenizer."""
        inner = _Tokenizer(self._inner.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            setattr(inner, part, getattr(self._inner, part))
        added = self._inner.get_added_tokens_decoder()
        inner.add_tokens([added[token] for token in sorted(added)])
        if inner.get_added_tokens_decoder().keys() != added.keys():  # ids that aren't the next free ones
            inner = _Tokenizer.from_str(self._inner.to_str())
        return inner

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return Detokenizer(self._inner)

    @cached_property
    def _detokenizer_with_special(self) -> Detokenizer:
        return Detokenizer(self._inner, keep_special=True)

    def prepare(self) -> None:
        """Does now what the first text and the first stream would otherwise wait for. It takes most of a second for a
        vocabulary of 256k, in which no other thread can run."""
        _ = self._lengths, self._detokenizer, self._with_special_tokens

    def token_id(self, token: str) -> int | None:
        """The id of a token as tokenizer.json spells it."""
        return self._inner.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, which are not text."""
        added = self._inner.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; bytes that aren't UTF-8 become U+FFFD."""
        (text,) = self._inner.decode_batch([list(ids)], skip_special_tokens=True)  # lets other threads run
        return text

    def most_characters(self, tokens: int) -> int:
        """The most characters that a text of `tokens` tokens can have.

        This is certain if the tokenizer spells out all that it is given, as byte-level and byte-fallback ones do. For
        one that drops or joins what it doesn't know, it is merely a limit.
        """
        shrinks = 1 if self._inner.normalizer is None else NORMALIZED
        return tokens * int(self._lengths.max()) * shrinks

    def spelt_characters(self, ids: np.ndarray) -> int:
        """The most characters that the text of `ids` can have, which must all be in the vocabulary."""
        return int(self._lengths[ids].sum()) + len(ids)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """int64[ids]: characters of each token as the vocabulary spells it, which are its bytes in a byte-level one."""
        vocab = self._inner.get_vocab()
        lengths = np.zeros(max(vocab.values()) + 1, np.int64)
        lengths[list(vocab.values())] = [len(token) for token in vocab]
        return lengths

    def spellings(self, count: int) -> list[bytes]:
        """The bytes that each id below `count` adds behind other text; none for special tokens, and for ids without a
        token. It takes most of a second for a vocabulary of 256k. Raises TextError for a tokenizer where that depends
        on the tokens around it."""
        try:
            return self._detokenizer.spellings(count)
        except ValueError as error:
            raise TextError(str(error)) from None

    def stream(self, prompt: Sequence[int] = (), *, keep_special: bool = False) -> TextStream:
        """Opens a stream that returns the text of the tokens that follow `prompt`, as it is after the prompt's text.
        keep_special: whether special tokens are part of it, spelt as in the vocabulary."""
        return (self._detokenizer_with_special if keep_special else self._detokenizer).open(prompt)


def _declare(inner: _Tokenizer, declared: Sequence[tuple[AddedToken, bool]]) -> None:
    added = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    for token, promotes in declared:
        known = added.get(token.content)
        new = known is None or (promotes and token.special and not known.special)
        if new and inner.token_to_id(token.content) is not None:  # the model has no embedding for a new id
            inner.add_tokens([token])
            added[token.content] = token


def _without_settings(inner: _Tokenizer) -> None:
    """Turns off settings that are for training and were saved with the tokenizer."""
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None):
        inner.model.dropout = None


def _highest_id(inner: _Tokenizer) -> int:
    size = inner.get_vocab_size()
    if all(inner.id_to_token(token) is not None for token in range(size)):
        return size - 1  # several times faster than listing the vocabulary
    return max(inner.get_vocab().values())


@contextmanager
def _typed_errors() -> Iterator[None]:
    """Raises TextError when the library's regular expressions give up, which is a panic and not an Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TextError(f"the tokenizer gives up on it: {str(error).strip()[:200]}") from None


def _count_parts(inner: _Tokenizer, text: str, most: int) -> None:
    """Raises TooManyTokens if a long text has far more than `most` tokens, which it counts part by part. If the text
    was encoded as a whole, each token would take about 250 bytes: a gigabyte for 4 MB of text."""
    if len(text) <= PART:
        return
    count = 0
    for start in range(0, len(text), PART):
        (part,) = inner.encode_batch_fast([text[start : start + PART]], add_special_tokens=False)
        count += max(0, len(part) - _PER_CUT)
        if count > most:
            raise TooManyTokens(count, most, whole=False)


def _ids(encoded: Sequence[Encoding], most: int | None) -> list[int]:
    (encoding,) = encoded
    if most is not None and len(encoding) > most:
        raise TooManyTokens(len(encoding), most)
    return encoding.ids


def _extents(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The offsets, extended by the space before a token, which some tokenizers trim from it."""
    extents, done = [], 0
    for start, end in offsets:
        extents.append((min(start, done), end))
        done = max(done, end)
    return extents
