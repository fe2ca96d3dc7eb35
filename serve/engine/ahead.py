"""Gives sequences rows of a step beyond that of their next token: for tokens that are scored, and for guesses."""

from __future__ import annotations

from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.drafts import Drafting
from isthmus.serve.engine.holdings import Holdings
from isthmus.serve.engine.messages import End, Request
from isthmus.serve.engine.packing import Step, Work
from isthmus.serve.engine.running import Running
from isthmus.serve.engine.scoring import divide
from isthmus.serve.engine.sequence import Sequence


class LookAhead:
    """Fills up the rows that a step has left."""

    def __init__(self, config: EngineConfig, rope_switch: int, holdings: Holdings) -> None:
        """config: resolved. rope_switch: as in ModelConfig."""
        self._config, self._rope_switch, self._holdings = config, rope_switch, holdings
        self._drafting = Drafting(config, rope_switch)
        self._company = 0
        """How many sequences take a row of each step; one that is scored takes all that are left"""

    def begin(self, running: Running) -> None:
        """Takes in which sequences run when a step is planned."""
        scores = any([sequence.scores for sequence in running])
        self._company = self._config.max_sequences if scores else len(running)

    def holds_back(self, sequence: Sequence) -> bool:
        """Whether a sequence waits for the token in flight, so that guesses can follow it."""
        return self._drafting.holds_back(sequence, self._company)

    def keep(self, request: Request, end: End) -> None:
        """Takes in how a request ended, which later ones may repeat."""
        self._drafting.keep(request, end)

    def add(self, step: Step) -> None:
        """Adds tokens that are scored to a step in which each sequence has what is its own, and guesses if it is
        without prompts."""
        for work, tokens in divide(step, self._config.max_sequences, self._rope_switch):
            self._add(work, tokens)
        for work in step.singles if not step.chunks else ():
            self._add(work, self._drafting.guess(work.sequence, step.rows, self._company))

    def _add(self, work: Work, tokens: tuple[int, ...]) -> None:
        """Adds tokens after the next one of a sequence, as many as there are pages for."""
        sequence = work.sequence
        if tokens and not self._holdings.grow(sequence, sequence.computed + len(tokens)):
            tokens = tokens[: self._holdings.room(sequence)]
        if tokens:
            work.ahead = tokens
            sequence.computed += len(tokens)
