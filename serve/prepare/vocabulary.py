"""A model's tokens as llguidance reads them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
from llguidance import LLTokenizer

from isthmus.errors import InvalidRequest
from isthmus.model.text.tokenizer import TextError, Tokenizer

_ENDS = b"\xff"
"""Begins the names of tokens that end a text. No UTF-8 has this byte; for llguidance it marks such names"""


class Vocabulary:
    """The bytes of each of a model's ids. It takes the place of llguidance's TokenizerWrapper, whose attributes it has.

    Special tokens have no bytes, so no grammar can ask for one; those that end a text are told to llguidance apart.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, ids: int) -> None:
        """ids: the width of the model's logits. It may be more than the tokenizer has, or less. Raises InvalidRequest
        for a tokenizer whose tokens have no bytes of their own."""
        self._tokenizer = tokenizer
        self.ends = sorted(index for index in tokenizer.eos_ids if index < ids)
        self.eos_token_id = self.ends[0] if self.ends else None
        try:
            self.tokens = tokenizer.spellings(ids)
        except TextError as error:
            raise InvalidRequest("response_format", f"can't be had from this model's tokenizer: {error}") from None
        for index in self.ends:
            self.tokens[index] = _ENDS + b"%d" % index
        self.special_token_ids: list[int] = []
        self.ids = ids

    @cached_property
    def text(self) -> np.ndarray:
        """int32[words]: a bit for each id that is text, the lowest bit first."""
        return self._bits(index for index, token in enumerate(self.tokens) if token and not token.startswith(_ENDS))

    @cached_property
    def text_or_end(self) -> np.ndarray:
        """int32[words]: `text`, and the ids that end a text."""
        return self.text | self._bits(self.ends)

    def _bits(self, ids: Iterable[int]) -> np.ndarray:
        bits = np.zeros(-(-self.ids // 32) * 32, bool)
        bits[list(ids)] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def buffer(self) -> np.ndarray:
        """int32[words] for llguidance to write a mask into. Where no token ends a text, it adds an id for one."""
        return np.zeros(-(-(self.ids + (not self.ends)) // 32), np.int32)

    def llguidance(self) -> LLTokenizer:
        """The tokenizer that grammars are compiled for. It takes about a second for a vocabulary of 256k."""
        return LLTokenizer(self, eos_token=self.ends or None)  # type: ignore[arg-type]

    def __call__(self, text: str) -> list[int]:
        """The ids that llguidance forces where a grammar leaves one text. They spell it exactly, also where the
        tokenizer would put a space before it, as it would before any text."""
        data = text.encode(errors="replace")
        try:
            ids = self._tokenizer.encode_part(text)
        except TextError:
            ids = []
        fits = all(index < self.ids for index in ids) and b"".join(self.tokens[index] for index in ids) == data
        return ids if fits else self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        """The longest token that the bytes begin with, then the longest of the rest, until there is none."""
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            found = next((end for end in ends if data[start:end] in self._by_bytes), None)
            if found is None:
                break
            ids.append(self._by_bytes[data[start:found]])
            start = found
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {token: index for index, token in enumerate(self.tokens) if token and not token.startswith(_ENDS)}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)
