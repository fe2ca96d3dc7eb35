"""Embeddings: one vector for a prompt, made of the hidden states of its tokens."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np

from isthmus.errors import InvalidRequest

if TYPE_CHECKING:
    from isthmus.serve.engine.messages import Request


class Pooling(enum.Enum):
    """What an embedding is made of: a prompt's hidden states after the model's last norm."""

    MEAN = "their mean"
    LAST = "that of the last token"


def check_pooled(request: Request) -> None:
    """Raises InvalidRequest for an embedding that can't be."""
    if request.pooling is None:
        return
    if request.scored_from is not None:
        raise InvalidRequest("scored_from", "must be None for an embedding")
    if request.max_tokens or request.resumed:
        raise InvalidRequest("max_tokens", "must be 0 for an embedding, and resume_token_ids empty: nothing is drawn")


class Embedding:
    """The mean of a prompt's hidden states from some position to its end, as far as they are known.

    They come by the blocks that prompts are cut into. Each block is summed in float64, and the blocks' sums in their
    order: so an embedding has the same bits whatever steps its blocks were computed in.
    """

    def __init__(self, pooling: Pooling, prompt_length: int) -> None:
        self.known = self._first = 0 if pooling is Pooling.MEAN else prompt_length - 1
        """The position whose hidden state is the next to come"""
        self._end = prompt_length
        self._sum = np.zeros(1)

    def add(self, states: np.ndarray) -> None:
        """Takes in the hidden states [tokens, dim] of a block's tokens from `known` on, in any dtype of floats."""
        self._sum = self._sum + states.astype(np.float64, order="C").sum(axis=0)
        self.known += len(states)
        assert self.known <= self._end, "hidden states past the prompt's end"

    @property
    def whole(self) -> bool:
        """Whether no hidden state is missing."""
        return self.known == self._end

    @property
    def finite(self) -> bool:
        """Whether all numbers so far were finite."""
        return bool(np.isfinite(self._sum).all())

    @property
    def vector(self) -> np.ndarray:
        """The embedding, float32[dim], which can't be written to."""
        assert self.whole
        vector = (self._sum / (self._end - self._first)).astype(np.float32)
        vector.flags.writeable = False
        return vector
