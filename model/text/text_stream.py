"""Turns tokens into text as they come. For all ids, and each place to cut them into a prompt and what follows it:

    the prompt's text + all that the stream returns == the text of all the ids together

This holds whatever the tokenizer's decoder does. A space that it strips from the beginning of a text is kept in the
middle, and bytes that aren't UTF-8 become U+FFFD. A character that the prompt leaves unfinished belongs to the stream.
No sequence of ids raises an error.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

_WINDOW = 8
"""About the most tokens that are decoded again to see what the next one adds"""
_MOST = 64
"""Most tokens that are kept while the newest of them have no text"""
_BYTE = re.compile("<0x([0-9a-fA-F]{2})>")


class TextStream(ABC):
    """Decodes tokens as they come, and returns text only in whole UTF-8 characters."""

    @abstractmethod
    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; empty while a character is unfinished."""

    @abstractmethod
    def flush(self) -> str:
        """The text that is still held at the end; the bytes of an unfinished character become U+FFFD."""


class Detokenizer:
    """Opens streams, and keeps what it finds out about single tokens for later ones. Safe to share between threads."""

    def __init__(self, inner: Tokenizer, *, keep_special: bool = False) -> None:
        """keep_special: whether special tokens are text, spelt as in the vocabulary."""
        self._inner, self._keep_special = inner, keep_special
        decoder = _steps(None if inner.decoder is None else json.loads(inner.decoder.__getstate__()))
        steps = [step["type"] for step in decoder]
        added = () if keep_special else inner.get_added_tokens_decoder().values()
        special = {str(token) for token in added if token.special}
        fallback = "ByteFallback" in steps
        self._kinds: dict[int, int] = _Table(lambda token: _kind(inner.id_to_token(token), special, fallback))
        self._bytes: dict[int, bytes] = _Table(lambda token: _byte_level(inner.id_to_token(token), special))
        self._has_bytes = "ByteLevel" in steps
        self._pieces: dict[int, str] | None = {} if _token_by_token(decoder) else None
        self._only_bytes = [step for step in steps if step != "Fuse"] == ["ByteLevel"]

    def open(self, prompt: Sequence[int]) -> TextStream:
        if self._only_bytes:
            return _ByteStream(self._bytes, prompt)
        return _WindowStream(self._text, self._kinds, self._bytes if self._has_bytes else None, self._pieces, prompt)

    def spellings(self, count: int) -> list[bytes]:
        """The bytes that each id below `count` adds behind other text; none for special tokens, and for ids without a
        token. Raises ValueError for a tokenizer where that depends on the tokens around it."""
        if self._only_bytes:
            return [self._bytes[token] for token in range(count)]
        if self._pieces is None:
            raise ValueError("what its tokens spell depends on the tokens around them")
        kinds = [self._kinds[token] for token in range(count)]
        texts = [token for token, kind in enumerate(kinds) if kind == _TEXT]
        before = next((token for token in texts if self._text([token])), None)
        found = [b"" if kind < 0 else bytes([kind]) for kind in kinds]
        if before is not None:
            start = len(self._text([before]))
            behind = self._inner.decode_batch([[before, token] for token in texts], skip_special_tokens=True)
            for token, text in zip(texts, behind, strict=True):
                found[token] = text[start:].encode()
        return found

    def _text(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=not self._keep_special)


class _Table(dict[int, Any]):
    """The values of a function of ids, each computed once."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, token: int) -> Any:
        value = self[token] = self._function(token)
        return value


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a decoder in order, with sequences unrolled."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _token_by_token(steps: list[dict[str, Any]]) -> bool:
    """Whether a token adds the same text wherever it stands, except at the beginning and in a run of byte tokens."""
    fused = False
    for step in steps:
        if step["type"] == "Fuse":
            fused = True
        elif step["type"] == "Strip" and fused:
            if step["stop"]:
                return False
        elif fused or step["type"] not in ("Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"):
            return False
    return bool(steps)


# Byte-level tokenizers, where the bytes of a text are those of its tokens


def _byte_alphabet() -> dict[str, int]:
    """How GPT-2 writes bytes as characters: printable ones as themselves, the others as characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str | None, special: set[str]) -> bytes:
    if token is None or token in special:
        return b""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # an added token is spelt as it is
        return token.encode()


def _tail(table: dict[int, bytes], ids: Sequence[int]) -> bytes:
    """The last 3 bytes of the ids' text; an unfinished character has no more."""
    tail = b""
    for token in reversed(ids):
        if len(tail) >= 3:
            break
        tail = table[token] + tail
    return tail[-3:]


class _ByteStream(TextStream):
    def __init__(self, table: dict[int, bytes], prompt: Sequence[int]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(_tail(table, prompt))

    def push(self, ids: Sequence[int]) -> str:
        table = self._table
        return self._decoder.decode(b"".join([table[token] for token in ids]))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


# All other tokenizers, where a token's text is the difference between decoding with it and without it


_TEXT, _NOTHING = -1, -2
"""Kinds of tokens: with text, and without any. The kind of a token that stands for a byte is that byte, 0 to 255"""


def _kind(token: str | None, special: set[str], fallback: bool) -> int:
    if token is None or token in special:
        return _NOTHING
    byte = _BYTE.fullmatch(token) if fallback else None
    return _TEXT if byte is None else int(byte[1], 16)


class _WindowStream(TextStream):
    """Holds back tokens whose text may still change: those of an unfinished character, and a run of byte tokens until
    it ends, because an invalid byte at its end turns the whole run into U+FFFD."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        kinds: dict[int, int],
        table: dict[int, bytes] | None,
        pieces: dict[int, str] | None,
        prompt: Sequence[int],
    ) -> None:
        """table: the bytes of each token, if the decoder joins bytes and does more besides. pieces: the text that each
        token was found to add after others, if that is always the same."""
        self._decode, self._kinds, self._table, self._pieces = decode, kinds, table, pieces
        self._settled = False
        """Whether what was shown has text, so that `pieces` is right for what follows"""
        self._shown, self._held = self._context(prompt)
        """The tokens whose text was returned, and those whose text is held back"""
        self._text = decode(self._shown)

    def _context(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """The prompt's last tokens: enough to know what the next one adds, and those of an unfinished character."""
        ids: list[int] = []
        run, size = 0, _WINDOW
        for token in reversed(prompt):
            if self._kinds[token] == _NOTHING:
                continue
            if run == len(ids) and self._kinds[token] >= 0:
                run += 1
            elif len(ids) >= run + size:
                if self._decode(ids[::-1]):
                    break
                size *= 2
            ids.append(token)
        ids.reverse()
        if self._table is None:
            end = len(ids) - _unfinished(bytes(self._kinds[token] for token in ids[len(ids) - run :]))
        else:
            end = self._closed(ids)
        return ids[:end], ids[end:]

    def push(self, ids: Sequence[int]) -> str:
        known = len(self._held)
        self._held += [token for token in ids if self._kinds[token] != _NOTHING]
        end = self._closed(self._held, known)
        if end == 0:
            return ""
        closed, self._held = self._held[:end], self._held[end:]
        return self._give(closed)

    def flush(self) -> str:
        held, self._held = self._held, []
        return self._give(held) if held else ""

    def _closed(self, ids: list[int], known: int = 0) -> int:
        """How many of `ids`, from the first, have a text that can't change any more. The first `known` are held
        already, and stay so if only byte tokens follow them."""
        end = len(ids)
        if self._table is None:
            while end > known and self._kinds[ids[end - 1]] >= 0:
                end -= 1
            return 0 if end == known else end
        missing = _unfinished(_tail(self._table, ids), lenient=True)
        while missing > 0:
            end -= 1
            missing -= len(self._table[ids[end]])
        return end

    def _give(self, ids: list[int]) -> str:
        if self._settled and self._pieces is not None:
            return self._behind(ids, self._pieces)
        shown = self._shown + ids
        text = self._decode(shown)
        # Otherwise the prompt ends in bytes that were valid only without those that follow; what was shown stays.
        new = text[len(self._text) :] if text.startswith(self._text) else self._decode(ids)
        self._shown, self._text, self._settled = shown, text, bool(text)
        if len(shown) > _WINDOW:
            self._shorten()
        return new

    def _behind(self, ids: list[int], pieces: dict[int, str]) -> str:
        """The text that `ids` add after some other text, which is the same whatever that is."""
        if len(ids) > 1:
            return self._decode(self._shown + ids)[len(self._text) :]
        piece = pieces.get(ids[0])
        if piece is None:
            piece = pieces[ids[0]] = self._decode(self._shown + ids)[len(self._text) :]
        return piece

    def _shorten(self) -> None:
        """Forgets tokens that don't matter for what follows. Those that are kept have some text, so that the decoder
        doesn't take what follows for the beginning of a text, where it strips spaces."""
        last = self._shown[-_WINDOW // 2 :]
        text = self._decode(last)
        if text:
            self._shown, self._text = last, text
        elif len(self._shown) > _MOST:
            self._shown = [*self._shown[: _MOST // 2], *last]
            self._text = self._decode(self._shown)


def _unfinished(run: bytes, *, lenient: bool = False) -> int:
    """How many bytes at the end begin a character without completing it. It is 0 if the bytes before them aren't UTF-8,
    unless `lenient`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if lenient else "strict")
    try:
        decoder.decode(run)
    except UnicodeDecodeError:
        return 0
    return len(decoder.getstate()[0])
