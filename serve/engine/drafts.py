"""Guesses of a sequence's next tokens from what it holds already: text that repeats, such as code that is edited or a
source that is quoted, is mostly a copy of an earlier place. A step checks several guesses at once (speculative
decoding, Leviathan et al. 2022, arXiv 2211.17192; by lookup: Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding).

A guess is taken while it is what the step draws, each token with its own position's random numbers: so the text is the
same whether there are guesses or not.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3
"""Tokens that must agree before a place counts as an earlier one"""
MOST_GUESSES = 7
"""A step checks at most so many tokens of a sequence beyond the first"""
PATIENCE = 3
"""Tokens in a row that the lookup must have foretold before guesses are checked"""


class Lookup:
    """Follows a sequence token by token, and the place that it repeats."""

    def __init__(self, known: Sequence[int], source: Sequence[int] = ()) -> None:
        """known: the sequence so far. source: tokens that it may repeat besides its own."""
        self._tokens = [*source]
        self._last: dict[tuple[int, ...], int] = {}
        """The index after the last occurrence of each GRAM tokens, but for those at the very end"""
        self._at: int | None = None
        """The index of what comes next at the place that is repeated"""
        self._hits = 0
        self._guesses = MOST_GUESSES
        for token in known:
            self._append(token)

    @property
    def foretells(self) -> bool:
        """Whether the last tokens were foretold, so that it is worth checking guesses."""
        return self._hits >= PATIENCE and self._at is not None

    def guess(self, most: int) -> list[int]:
        """What comes next if the sequence goes on repeating, at most `most` tokens."""
        if self._at is None:
            return []
        return self._tokens[self._at : self._at + min(most, self._guesses)]

    def take(self, tokens: Sequence[int], guessed: int = 0) -> None:
        """Goes on by tokens that were drawn. guessed: how many tokens had been guessed in their place."""
        for token in tokens:
            self._hits = self._hits + 1 if self._foretold() == token else 0
            self._append(token)
        if guessed:  # as many as lately came true, and a few more
            right = len(tokens) - 1
            self._guesses = min(MOST_GUESSES, max(1, 2 * right) if right < guessed else 2 * guessed)
            if right:
                self._hits = max(self._hits, PATIENCE)

    def _foretold(self) -> int | None:
        return None if self._at is None else self._tokens[self._at]

    def _append(self, token: int) -> None:
        follows = self._foretold() == token
        self._tokens.append(token)
        end = len(self._tokens)
        gram = tuple(self._tokens[end - GRAM :]) if end >= GRAM else None
        if follows and self._at is not None:
            self._at += 1
        else:
            self._at = self._last.get(gram) if gram is not None else None
        if gram is not None:
            self._last[gram] = end
        if self._at is not None and self._at >= end:
            self._at = None
