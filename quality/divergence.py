"""How far predictions are from those of another model: KL divergence as llama-perplexity defines it, agreement and
perplexity, and how well each is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_LOG_PROBABILITY = -16.0
"""Of a token that counts for the divergence"""

ROWS = 32
"""Tokens whose distributions are compared at once: a vocabulary of 262k takes 34 MB each time it is copied"""


@dataclass(frozen=True)
class Divergence:
    """Over all tokens that are predicted."""

    tokens: int
    kl: float
    """Mean KL divergence from the original's distributions, nats a token"""
    kl_error: float
    """Its standard error, tokens taken as independent, as llama.cpp does"""
    top1: float
    """Share of tokens where both have the same likeliest next one"""
    perplexity: float
    base_perplexity: float
    """Of the original"""

    @property
    def ratio(self) -> float:
        return self.perplexity / self.base_perplexity


@dataclass(frozen=True)
class Quality(Divergence):
    """With errors that hold where a text's tokens depend on each other; those of one window are NaN."""

    windows: int
    kl_window_error: float
    """Standard error of the mean KL divergence, windows taken as independent"""
    ratio_window_error: float
    """Of the logarithm of `ratio`, likewise"""


class Gathered:
    """Figures of tokens, window by window, as llama-perplexity makes them."""

    def __init__(self) -> None:
        self._windows: list[np.ndarray] = []

    def add(self, want: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> None:
        """A window. want: float32[tokens, vocab] of log-probabilities; targets: int32[tokens], what came."""
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
    """float64[tokens, 4]: KL divergence, whether the likeliest token is the same, nats of what came, and the
    original's."""
    got, row = log_softmax(logits), np.arange(len(targets))
    same = want.argmax(axis=1) == got.argmax(axis=1)
    return np.stack([kl_divergence(want, got), same, -got[row, targets], -want[row, targets]], axis=1)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of their mean; NaN of a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32[tokens, vocab]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def kl_divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """float64[tokens] in nats, of log-probabilities float32[tokens, vocab]; what the original gives less than e^-16
    doesn't count."""
    counted = want > LEAST_LOG_PROBABILITY
    return np.where(counted, np.exp(want) * (want - got), 0).sum(axis=1, dtype=np.float64)
