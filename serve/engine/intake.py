"""Takes what steps drew into the sequences that they drew for."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import replace
from typing import Protocol

import numpy as np

from isthmus.model.ops.sampling import BAD_ROW, Drawn
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.holdings import Holdings
from isthmus.serve.engine.messages import Ending, Event
from isthmus.serve.engine.outcomes import Counters, joined, logprobs_of, stops
from isthmus.serve.engine.plan import StepPlan
from isthmus.serve.engine.scoring import take
from isthmus.serve.engine.sequence import Sequence


class Finish(Protocol):
    """Ends a sequence, whose pages are free at once, and returns its last event."""

    def __call__(self, sequence: Sequence, reason: Ending, now: float) -> Event: ...


class Intake:
    """Gives sequences their tokens, scores and hidden states, and ends those that these end."""

    def __init__(self, config: EngineConfig, holdings: Holdings, counters: Counters, finish: Finish) -> None:
        """config: resolved."""
        self._config, self._holdings, self._counters, self._finish = config, holdings, counters, finish

    def draws(self, plan: StepPlan, row: int, sequence: Sequence, drawn: Drawn, now: float) -> Event:
        """Takes in what a plan drew for a sequence among its samples, which has this row in the first step. drawn: in
        numpy's arrays, which came at `now`."""
        rows = plan.rows_of(row, sequence, len(drawn.token))
        sequence.tokens_in_flight -= max(len(rows), plan.steps)
        if sequence.in_prompt:
            return self._scored(sequence, drawn, rows, now)
        if guesses := plan.tokens_ahead(sequence):
            return joined(list(self._guessed(sequence, guesses, drawn, rows, now)))
        if plan.steps > 1:
            return joined(list(self._several(sequence, drawn, rows, now)))
        return self._token(sequence, drawn, row, now)

    def hidden(self, sequence: Sequence, states: np.ndarray, now: float) -> list[Event]:
        """Takes in a block's hidden states. Returns the sequence's last event if its embedding is whole, or not
        finite."""
        embedding = sequence.embedding
        assert embedding is not None
        embedding.add(states)
        if not embedding.finite:
            self._holdings.prefixes.forget(sequence)
            return [self._finish(sequence, Ending.ERROR, now)]
        return [self._finish(sequence, Ending.EMBEDDED, now)] if embedding.whole else []

    def _scored(self, sequence: Sequence, drawn: Drawn, rows: list[int], now: float) -> Event:
        """Takes in tokens of the prompt that were scored in these rows."""
        told = take(sequence, drawn, rows)
        if told is None:
            self._holdings.prefixes.forget(sequence)
            return self._finish(sequence, Ending.ERROR, now)
        if sequence.slot >= 0:
            self._holdings.register(sequence)
        if len(sequence.tokens) == sequence.prompt_length + sequence.request.max_tokens:
            return replace(self._finish(sequence, Ending.LENGTH, now), prompt_logprobs=told)
        return Event(sequence.request, progress=sequence.progress(now), prompt_logprobs=told)

    def _guessed(
        self, sequence: Sequence, guesses: Tokens[int], drawn: Drawn, rows: list[int], now: float
    ) -> Iterator[Event]:
        """Takes in what was drawn after the last known token, and what was drawn behind each guess that is that."""
        right = 0
        for event, guess in zip(self._several(sequence, drawn, rows, now), (*guesses, None), strict=False):
            yield event
            if event.end is not None or event.tokens[-1] != guess:
                break
            right += 1
        self._counters.drafted_tokens += len(guesses)
        self._counters.accepted_tokens += right
        if (guesser := sequence.guesser) is not None:
            guesser.learn(len(guesses), right)
            self._counters.recalled_tokens += len(guesses) if guesser.recalls else 0
            self._counters.accepted_recalled_tokens += right if guesser.recalls else 0

    def _several(self, sequence: Sequence, drawn: Drawn, rows: list[int], now: float) -> Iterator[Event]:
        """Takes in what was drawn in each of these rows, one after the other, up to the sequence's end."""
        for row in rows:
            if sequence.slot >= 0:  # keys and values of what isn't taken in are none of this sequence's
                sequence.computed = len(sequence.tokens)
            event = self._token(sequence, drawn, row, now)
            yield event
            if event.end is not None:
                break

    def _token(self, sequence: Sequence, drawn: Drawn, row: int, now: float) -> Event:
        token, logprobs = int(drawn.token[row]), logprobs_of(sequence.request, drawn, row)
        if token == BAD_ROW:
            self._holdings.prefixes.forget(sequence)
            return self._finish(sequence, Ending.ERROR, now)
        sequence.tokens.append(token)
        sequence.logprobs += logprobs
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        self._counters.completion_tokens += 1
        if sequence.slot >= 0:
            self._holdings.register(sequence)
        reason = stops(sequence, token, self._config.context_length)
        if reason is not None:
            return replace(self._finish(sequence, reason, now), tokens=(token,), logprobs=logprobs)
        return Event(sequence.request, (token,), logprobs, progress=sequence.progress(now))
