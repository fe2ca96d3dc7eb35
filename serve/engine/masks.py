"""Masks, which say as bits over the vocabulary what tokens a request lets be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.model.ops.adjustments import words_for
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import mask_of


@dataclass(frozen=True)
class Masks:
    """int32[words] each, as in `isthmus.serve.engine.sampling.Adjusting.allowed`."""

    early: np.ndarray
    """Until min_tokens are drawn"""
    later: np.ndarray
    min_tokens: int

    def at(self, drawn: int) -> np.ndarray:
        """What may come after `drawn` tokens."""
        return self.early if drawn < self.min_tokens else self.later


def masks_of(request: Request, size: int) -> Masks | None:
    """The masks of a request over `size` ids; None where any token may come at any time. Raises IndexError for an id
    beyond them."""
    sampling = request.sampling
    if not sampling.masks:
        return None
    allowed = np.full(words_for(size), -1, np.int32) if sampling.allowed is None else mask_of(sampling.allowed, size)
    later = allowed & ~mask_of(sampling.bad, size)
    early = later & ~mask_of(request.eos_ids | request.stop_ids, size)
    return Masks(early, later, sampling.min_tokens)
