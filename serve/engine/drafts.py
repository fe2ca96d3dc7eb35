"""Guesses of a sequence's next tokens. Text that repeats, such as code that is edited or a source that is quoted, is
mostly a copy of an earlier place, or of what its caller has foretold; an answer may be one that its caller has had
before (history.py); and a constraint may leave one way only. A step checks several guesses at once (speculative
decoding, Leviathan et al. 2022, arXiv 2211.17192; by lookup: Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding; by earlier answers: Oliaro et al. 2024, arXiv 2411.04975).

A guess is taken while it is what the step draws, each token with its own position's random numbers: so the text is the
same whether there are guesses or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from isthmus.serve.engine import history
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.history import NO_TOKEN, Histories, History, Place
from isthmus.serve.engine.messages import End, Request

if TYPE_CHECKING:
    from isthmus.serve.engine.sequence import Sequence

GRAM = 3
"""Tokens that must agree before a place counts as an earlier one"""
MOST_GUESSES = 7
"""A step checks at most so many tokens of a sequence beyond the first"""
PATIENCE = 4
"""Tokens in a row that must have been foretold before guesses are checked"""
MOST_NEEDED = 64
"""Tokens that a place of an earlier text must agree with at most, however often guesses were wrong"""
LEAST_FORCED = 2
"""A sequence whose form leaves one way waits for the token in flight if so many tokens at least follow that one"""
MOST_INDEXED = 512
"""Tokens that are indexed for a sequence in a step, so that a long prompt holds nobody up"""


class Lookup:
    """Follows a sequence token by token, and the place that it repeats."""

    def __init__(self, predicted: Tokens[int] = (), begins: int = 0) -> None:
        """predicted: what the sequence is expected to go on with behind its first `begins` tokens. It counts as an
        earlier place."""
        self._predicted, self._begins = (*predicted, NO_TOKEN) if predicted else (), begins
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
        return tuple(takewhile(lambda token: token != NO_TOKEN, guesses))

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of a guess were right: as many are guessed next time, and a few more."""
        self._most = _most_after(guessed, right)

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


class Recall:
    """Follows a sequence, and the places of earlier texts that go on as it does."""

    def __init__(self, earlier: History) -> None:
        self._history = earlier
        self._known = 0
        """How much of the sequence it has followed"""
        self._places: list[Place] = []
        self._agreed = 0
        """How many of the sequence's last tokens are those before each place, at least"""
        self._needed = GRAM + PATIENCE
        """How many must be, so that guesses are worth it"""
        self._most = MOST_GUESSES

    def follow(self, tokens: Tokens[int]) -> bool:
        """As Lookup.follow, of the texts of the history that are indexed so far."""
        self._history.index(history.MOST_INDEXED)
        missing = len(tokens) - self._known
        self._known = len(tokens)
        if missing > MOST_GUESSES + 1:
            self._places = []
        for token in tokens[-missing:] if missing and self._places else ():
            self._places = [place.next for place in self._places if place.token == token]
            self._agreed += 1
        self._places = [place for place in self._places if place.token != NO_TOKEN]
        if missing and not self._places:
            self._agreed, self._places = self._history.find(tokens)
        return self._agreed >= self._needed and (len(self._places) == 1 or bool(self.guess(1)))

    def guess(self, most: int) -> tuple[int, ...]:
        """What followed most often at these places, at most `most` tokens, and no more than half of them have."""
        most, places = min(most, self._most), self._places
        if len(places) == 1:
            window, index = places[0]
            return tuple(takewhile(lambda token: token != NO_TOKEN, window.tokens[index : index + most]))
        guesses: list[int] = []
        while places and len(guesses) < most:
            following = [place.token for place in places]
            token = max(following, key=following.count)  # of those as frequent the newest
            if token == NO_TOKEN or 2 * following.count(token) < len(self._places):
                break
            guesses.append(token)
            places = [place.next for place in places if place.token == token]
        return tuple(guesses)

    def learn(self, guessed: int, right: int) -> None:
        """As Lookup.learn; and after a guess that was all wrong, places must agree with twice as many tokens."""
        self._most = _most_after(guessed, right)
        self._needed = GRAM + PATIENCE if right else min(2 * self._needed, MOST_NEEDED)


def _most_after(guessed: int, right: int) -> int:
    return MOST_GUESSES if right == guessed else min(MOST_GUESSES, 2 * right + 1)


class Guesser:
    """Guesses a sequence's next tokens: by its own text and what is foretold of it, and if they say nothing, by earlier
    texts of whoever asks."""

    def __init__(self, lookup: Lookup, earlier: History | None) -> None:
        self._own, self._recall = lookup, None if earlier is None else Recall(earlier)
        self._chosen: Lookup | Recall | None = None

    @property
    def recalls(self) -> bool:
        """Whether the last guess is from earlier texts."""
        return self._chosen is not None and self._chosen is self._recall

    def follow(self, tokens: Tokens[int]) -> bool:
        """As Lookup.follow, of either."""
        self._chosen = None
        if self._own.follow(tokens):
            self._chosen = self._own
        elif self._recall is not None and self._recall.follow(tokens):
            self._chosen = self._recall
        return self._chosen is not None

    def guess(self, most: int) -> tuple[int, ...]:
        """What comes next, at most `most` tokens."""
        return () if self._chosen is None else self._chosen.guess(most)

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of the last guess were right."""
        if self._chosen is not None:
            self._chosen.learn(guessed, right)


class Drafting:
    """Decides which sequences of a step have guesses checked: those whose text repeats, if it has rows to spare."""

    def __init__(self, config: EngineConfig, rope_switch: int) -> None:
        """config: resolved. rope_switch: as in ModelConfig; models that have one are not guessed for."""
        self._rows = 0 if rope_switch else config.draft_rows
        kept = config.draft_history if self._rows and config.prefix_cache else 0
        self.histories = Histories(kept) if kept else None
        """What is kept of earlier texts; None keeps none"""

    def keep(self, request: Request, end: End) -> None:
        """Takes in how a request ended, which later ones may repeat. It is indexed when one of them asks."""
        if self.histories is not None:
            self.histories.add(request, end)

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
        assert sequence.guesser is not None
        return sequence.guesser.guess(most)

    def _foretells(self, sequence: Sequence, running: int) -> bool:
        if 2 * running > self._rows or sequence.scores:
            return False
        if sequence.constraint is not None:  # what may come is known, and repeating isn't
            return len(sequence.constraint.forced()) > (LEAST_FORCED if sequence.tokens_in_flight else 0)
        if sequence.guesser is None:
            earlier = None if self.histories is None else self.histories.of(sequence.request)
            sequence.guesser = Guesser(Lookup(sequence.request.predicted, sequence.prompt_length), earlier)
        return sequence.guesser.follow(sequence.tokens)
