"""How far predictions are from those of another model: KL divergence as llama-perplexity defines it, agreement and
perplexity, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_LOG_PROBABILITY = -16.0
"""Tokens of the vocabulary to which the original gives less than this don't count for the divergence"""

ROWS = 32
"""How many tokens' distributions are compared at once; with a vocabulary of 262k each copy of them takes 34 MB"""


@dataclass(frozen=True)
class Divergence:
    """Figures over all tokens that are predicted."""

    tokens: int
    kl: float
    """Mean KL divergence from the original's distributions, nats per token"""
    kl_error: float
    """Standard error of `kl`, with tokens taken as independent, as llama.cpp does"""
    top1: float
    """Share of tokens for which both models have the same most likely next token"""
    perplexity: float
    base_perplexity: float
    """Perplexity of the original"""

    @property
    def ratio(self) -> float:
        return self.perplexity / self.base_perplexity


@dataclass(frozen=True)
class Quality(Divergence):
    """The same figures, with standard errors that also hold if tokens of a text depend on each other; NaN for a single
    window."""

    windows: int
    kl_window_error: float
    """Standard error of `kl`, with windows taken as independent"""
    ratio_window_error: float
    """Standard error of the logarithm of `ratio`, with windows taken as independent"""


class Gathered:
    """Collects the figures of tokens, window by window, as llama-perplexity computes them."""

    def __init__(self) -> None:
        self._windows: list[np.ndarray] = []

    def add(self, want: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> None:
        """Adds a window. want: the original's log-probabilities, and logits: the other model's logits, both
        float32[tokens, vocab]; targets: int32[tokens], the tokens that came."""
        parts = (slice(row, row + ROWS) for row in range(0, len(want), ROWS))
        self._windows.append(np.concatenate([_figures(want[part], logits[part], targets[part]) for part in parts]))

    def quality(self) -> Quality:
        kl, same, nats, base_nats = np.concatenate(self._windows).T
        means = np.stack([window.mean(axis=0) for window in self._windows])
        return Quality(
            tokens=len(kl),
            kl=float(kl.mean()),
            kl_error=standard_error(kl),
            top1=float(same.mean()),
            perplexity=math.exp(float(nats.mean())),
            base_perplexity=math.exp(float(base_nats.mean())),
            windows=len(means),
            kl_window_error=standard_error(means[:, 0]),
            ratio_window_error=standard_error(means[:, 2] - means[:, 3]),
        )


def _figures(want: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64[tokens, 4]: KL divergence, whether both have the same most likely token, and the negative log-probability
    of the token that came, in the other model and in the original."""
    got, row = log_softmax(logits), np.arange(len(targets))
    same = want.argmax(axis=1) == got.argmax(axis=1)
    return np.stack([kl_divergence(want, got), same, -got[row, targets], -want[row, targets]], axis=1)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """The standard error of the values' mean; NaN for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log-probabilities, float32[tokens, vocab]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def kl_divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """The KL divergence in nats, float64[tokens]. want, got: the original's and the other model's log-probabilities,
    float32[tokens, vocab]; those for which `want` is not above LEAST_LOG_PROBABILITY don't count."""
    counted = want > LEAST_LOG_PROBABILITY
    return np.where(counted, np.exp(want) * (want - got), 0).sum(axis=1, dtype=np.float64)
