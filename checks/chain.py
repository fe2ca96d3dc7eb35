"""A constraint that needs no grammar: each token decides which may come next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from isthmus.serve.engine.constraint import Constraint, ConstraintError
from isthmus.serve.engine.sampling import mask_of


def may_follow(token: int, vocab: int) -> frozenset[int]:
    """Three tokens, which are others after any other token."""
    return frozenset((3 * token + step) % vocab for step in (7, 11, 13))


@dataclass
class Chain:
    """Only tokens of `may_follow` may come; after `length` of them nothing may, if that isn't 0."""

    vocab: int
    ids: int
    """The width of the model's logits"""
    length: int = 0
    fails_at: int = -1
    """After so many tokens it can't go on"""
    tokens: list[int] = field(default_factory=list)

    def fill(self, into: np.ndarray) -> None:
        if len(self.tokens) == self.fails_at:
            raise ConstraintError("it can't go on")
        into[:] = mask_of(may_follow(self.tokens[-1] if self.tokens else 0, self.vocab), self.ids)

    def accept(self, token: int) -> None:
        if token not in may_follow(self.tokens[-1] if self.tokens else 0, self.vocab):
            raise ConstraintError(f"{token} may not come")
        self.tokens.append(token)

    def forced(self) -> list[int]:
        return []

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.length

    def copy(self) -> Constraint:
        return replace(self, tokens=list(self.tokens))
