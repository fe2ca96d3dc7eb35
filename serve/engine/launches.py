"""Decides how many steps are launched at once: several where nothing but the next tokens of running sequences is to be
computed, and the host has no say in them (multi-step decoding)."""

from __future__ import annotations

from isthmus.serve.engine.budget import Budget
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.holdings import Holdings
from isthmus.serve.engine.packing import Step
from isthmus.serve.engine.plan import MOST_ENDS
from isthmus.serve.engine.sequence import Sequence


class Launches:
    """Adds steps to one in which every running sequence has its next token."""

    def __init__(self, config: EngineConfig, rope_switch: int, holdings: Holdings, budget: Budget) -> None:
        """config: resolved. rope_switch: as in ModelConfig; models that have one are launched step by step."""
        self._most = 1 if rope_switch else config.steps_per_launch
        self._rows = config.loops[-1].rows if config.loops else 0
        self._holdings, self._budget = holdings, budget

    def extend(self, step: Step, running: int) -> None:
        """Adds steps, and pages for their tokens, if all of `running` sequences are in the step with a token each."""
        works = step.singles
        if self._most == 1 or step.chunks or len(works) != running or not 0 < running <= self._rows:
            return
        steps = min(self._most, self._budget.steps(), *(_left(work.sequence) for work in works))
        if steps <= 1 or any(work.ahead or not _is_plain(work.sequence) for work in works):
            return
        for work in works:
            sequence = work.sequence
            if not self._holdings.grow(sequence, sequence.computed + steps - 1, later=True):
                steps = min(steps, 1 + self._holdings.room(sequence))
        step.steps = steps
        for work in works:
            work.sequence.computed += steps - 1


def _left(sequence: Sequence) -> int:
    """How many tokens it may draw yet."""
    return sequence.prompt_length + sequence.request.max_tokens - sequence.length


def _is_plain(sequence: Sequence) -> bool:
    """Whether the device can draw its next tokens by itself, and tell its end."""
    return not (sequence.adjusts or sequence.scores) and len(sequence.ends) <= MOST_ENDS
