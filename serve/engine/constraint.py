"""What restricts the tokens that a sequence may draw. The engine steps it and knows nothing of grammars."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class ConstraintError(Exception):
    """A constraint can't go on; the message says why. It ends the sequence that has it, and no other."""


class Constraint(Protocol):
    """The state of one sequence, which owns it. The engine thread alone calls it."""

    def fill(self, into: np.ndarray) -> None:
        """Writes which tokens may come next. into: int32[words], a bit for each id, the lowest bit first; words is the
        number of the model's ids / 32, rounded up. Where the text is complete, tokens that end it may come. Raises
        ConstraintError if that can't be told within the limits."""

    def accept(self, token: int) -> None:
        """Goes on by a token that was drawn. Raises ConstraintError for a token that may not come."""

    def forced(self) -> list[int]:
        """Tokens that must come next, because there is one text that may. It may be empty although there is one."""

    @property
    def done(self) -> bool:
        """Whether no text may follow: the sequence ends here, without a token that ends it."""

    def copy(self) -> Constraint:
        """The same state, for another sequence of the same request."""
