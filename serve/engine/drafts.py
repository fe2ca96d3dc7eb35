"""Guesses of a sequence's next tokens. Text that repeats, such as code that is edited or a source that is quoted, is
mostly a copy of an earlier place, or of what its caller has foretold; and a constraint may leave one way only. A step
checks several guesses at once (speculative decoding, Leviathan et al. 2022, arXiv 2211.17192; by lookup: Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding).

A guess is taken while it is what the step draws, each token with its own position's random numbers: so the text is the
same whether there are guesses or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from isthmus.serve.engine.config import EngineConfig

if TYPE_CHECKING:
    from isthmus.serve.engine.sequence import Sequence

GRAM = 3
"""Tokens that must agree before a place counts as an earlier one"""
MOST_GUESSES = 7
"""A step checks at most so many tokens of a sequence beyond the first"""
PATIENCE = 4
"""Tokens in a row that must have been foretold before guesses are checked"""
_NO_TOKEN = -1
"""Ends a prediction: no sequence holds it"""
LEAST_FORCED = 2
"""A sequence whose form leaves one way waits for the token in flight if so many tokens at least follow that one"""
MOST_INDEXED = 512
"""Tokens that are indexed for a sequence in a step, so that a long prompt holds nobody up"""


class Lookup:
    """Follows a sequence token by token, and the place that it repeats."""

    def __init__(self, predicted: Tokens[int] = (), begins: int = 0) -> None:
        """predicted: what the sequence is expected to go on with behind its first `begins` tokens. It counts as an
        earlier place."""
        self._predicted, self._begins = (*predicted, _NO_TOKEN) if predicted else (), begins
        self._tokens: list[int] = []
        """The prediction, and the sequence as far as it has been followed"""
        self._after: dict[tuple[int, ...], int] = {}
        """The index after the last occurrence of each GRAM tokens"""
        self._at: int | None = None
        """The index of what comes next at the place that is repeated"""
        self._hits = 0
        self._most = MOST_GUESSES

    def follow(self, tokens: Tokens[int]) -> bool:
        """Goes on to the end of `tokens`, the sequence so far. Returns whether it has come that far, and the last
        tokens were foretold, so that it is worth checking guesses."""
        for token in islice(self._missing(tokens), MOST_INDEXED):
            self._append(token)
        follows = len(self._tokens) == len(self._predicted) + len(tokens)
        return follows and self._hits >= PATIENCE and self._at is not None

    def guess(self, most: int) -> tuple[int, ...]:
        """What comes next if the sequence goes on repeating, at most `most` tokens."""
        if self._at is None:
            return ()
        guesses = self._tokens[self._at : self._at + min(most, self._most)]
        return tuple(takewhile(lambda token: token != _NO_TOKEN, guesses))

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of a guess were right: as many are guessed next time, and a few more."""
        self._most = MOST_GUESSES if right == guessed else min(MOST_GUESSES, 2 * right + 1)

    def _missing(self, tokens: Tokens[int]) -> Iterator[int]:
        known, ahead = len(self._tokens), len(self._predicted)
        yield from self._predicted[known:]
        yield from tokens[max(0, known - ahead) :]

    def _append(self, token: int) -> None:
        follows = self._at is not None and self._tokens[self._at] == token
        self._hits = self._hits + 1 if follows else 0
        self._tokens.append(token)
        end = len(self._tokens)
        if follows:
            self._at += 1  # type: ignore[operator]
        if self._predicted and end == len(self._predicted) + self._begins:
            self._at, self._hits = 0, PATIENCE
        if end < GRAM:
            return
        gram = tuple(self._tokens[-GRAM:])
        if self._hits == 0:
            self._at = self._after.get(gram)
        self._after[gram] = end


class Drafting:
    """Decides which sequences of a step have guesses checked: those whose text repeats, if it has rows to spare."""

    def __init__(self, config: EngineConfig, rope_switch: int) -> None:
        """config: resolved. rope_switch: as in ModelConfig; models that have one are not guessed for."""
        self._rows = 0 if rope_switch else config.draft_rows

    def holds_back(self, sequence: Sequence, running: int) -> bool:
        """Whether a sequence waits for the token in flight, so that guesses can follow it. running: how many run."""
        return sequence.tokens_in_flight > 0 and self._foretells(sequence, running)

    def guess(self, sequence: Sequence, rows: int, running: int) -> tuple[int, ...]:
        """What is to be checked after a sequence's last token, which is known. rows: how many the step has already."""
        left = sequence.prompt_length + sequence.request.max_tokens - sequence.length - 1
        most = min(self._rows - rows, left)
        if most <= 0 or sequence.tokens_in_flight or not self._foretells(sequence, running):
            return ()
        if sequence.constraint is not None:
            return tuple(sequence.constraint.forced()[: min(most, MOST_GUESSES)])
        assert sequence.lookup is not None
        return sequence.lookup.guess(most)

    def _foretells(self, sequence: Sequence, running: int) -> bool:
        if 2 * running > self._rows or sequence.scores:
            return False
        if sequence.constraint is not None:  # what may come is known, and repeating isn't
            return len(sequence.constraint.forced()) > (LEAST_FORCED if sequence.tokens_in_flight else 0)
        if sequence.lookup is None:
            sequence.lookup = Lookup(sequence.request.predicted, sequence.prompt_length)
        return sequence.lookup.follow(sequence.tokens)
