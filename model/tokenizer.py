"""The tokenizer that travels with a checkpoint (`tokenizer.json`), and training one: byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import DecodeStream

from model.config import ConfigError
from model.files import MAX_TOKENIZER_BYTES, read_text

END_OF_TEXT = "<|endoftext|>"
"""Starts every document in training and every prompt in serving; drawing it ends the sequence."""


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, inner: _Tokenizer) -> None:
        inner.encode_special_tokens = True  # a prompt that spells out a special token is text
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        self.eos_id: int | None = inner.token_to_id(END_OF_TEXT)
        self.eos_ids = frozenset() if self.eos_id is None else frozenset({self.eos_id})
        """Drawing one of these ends a text"""

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a Hugging Face `tokenizer.json`. Raises ConfigError when it isn't one."""
        text = read_text(path, MAX_TOKENIZER_BYTES)
        try:
            return cls(_Tokenizer.from_str(text))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE: every string can be encoded, and decoding gives back the same bytes.

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
        self._inner.save(str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer puts before a prompt. Special tokens written out in the text are text."""
        return self._inner.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As encode, in parallel."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts))]

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat template: special tokens written out in it are special, and nothing is added."""
        return self._with_special_tokens.encode(text, add_special_tokens=False).ids

    def encode_chat_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """As encode_chat, in parallel: each text's ids, and which of its characters each token stands for.

        The extents [start, end) tile the text, but for a character cut into several tokens: each of them has it whole.
        """
        encoded = self._with_special_tokens.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, _extents(encoding.offsets)) for encoding in encoded]

    @cached_property
    def _with_special_tokens(self) -> _Tokenizer:
        return _Tokenizer.from_str(self._inner.to_str())  # a copy: encode_special_tokens is a setting of the whole

    def token_id(self, token: str) -> int | None:
        """The id of a token as tokenizer.json spells it."""
        return self._inner.token_to_id(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self)


def _extents(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets with the space in front of a token, which some tokenizers trim from it, given back."""
    extents, done = [], 0
    for start, end in offsets:
        extents.append((min(start, done), end))
        done = max(done, end)
    return extents


class TextStream:
    """Decodes tokens one at a time and gives text out only in whole UTF-8 characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; empty while a character is unfinished."""
        text = []
        for token in ids:
            self._held.append(token)
            piece = self._stream.step(self._tokenizer._inner, token)
            if piece is not None:
                text.append(piece)
                self._held.clear()
        return "".join(text)

    def flush(self) -> str:
        """What is still held at the end: bytes of an unfinished character come out as U+FFFD."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held)
