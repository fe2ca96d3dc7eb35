"""What a model lost by being quantized: how far its predictions moved from those of the model that it was made from."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ConfigError, ModelConfig
from model.transformer import Params, bind
from train.step import packed_attention

WINDOW = 256
"""Tokens that are predicted together"""

ROWS = 32
"""Tokens whose distributions are compared at once: a vocabulary of 128k takes 16 MB each time it is copied"""

BOUNDS: dict[str, tuple[float, float]] = {"int8": (0.01, 1.01), "int4": (0.12, 1.10)}
"""By the coarsest integers in a model: the most KL divergence, in nats a token, and the most that perplexity may grow
by, for a conversion that nobody forced."""


class QualityError(RuntimeError):
    """A quantized model too far from the original."""


@dataclass(frozen=True)
class Quality:
    """Over the tokens of a text, each predicted from those before it."""

    tokens: int
    kl: float
    """Mean KL divergence of the quantized model's predictions from the original's, nats a token"""
    top1: float
    """Share of tokens where both have the same likeliest next one"""
    perplexity: float
    """Of the quantized model"""
    original_perplexity: float

    @property
    def ratio(self) -> float:
        return self.perplexity / self.original_perplexity

    def text(self) -> str:
        return (
            f"KL {self.kl:.2g} nats a token, the same likeliest token {self.top1:.1%}, "
            f"perplexity {self.perplexity:.4g} ({self.original_perplexity:.4g} before, {self.ratio - 1:+.2%}), "
            f"over {self.tokens:,} tokens"
        )

    def check(self, kind: str) -> None:
        """Raises QualityError past the bounds of "int8" or "int4"."""
        most_kl, most_ratio = BOUNDS[kind]
        if not (self.kl <= most_kl and self.ratio <= most_ratio):
            raise QualityError(
                f"{kind} moves this model too far: {self.text()}. The bounds are KL {most_kl} and perplexity "
                f"{most_ratio - 1:+.0%}; --force writes it all the same"
            )


def windows(tokens: Sequence[int], config: ModelConfig, most: int) -> np.ndarray:
    """int32[at most `most`, window + 1]: neighbouring windows of a text. Raises ConfigError for less than one."""
    size = min(WINDOW, config.context_length - 1) + 1
    count = min(most, len(tokens) // size)
    if not count:
        raise ConfigError(f"text: {len(tokens)} tokens are less than the {size} that are predicted together")
    return np.asarray(tokens[: count * size], np.int32).reshape(count, size)


def predictions(config: ModelConfig, params: Params, texts: np.ndarray) -> Iterator[np.ndarray]:
    """float32[window, vocab] of log-probabilities for each of texts int32[windows, window + 1]."""
    program = jax.jit(partial(_log_probabilities, config))
    for text in texts:
        yield np.asarray(program(params, text[:-1]))


def _divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    return (np.exp(want) * (want - got)).sum(axis=1)


def _log_probabilities(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    model = bind(config, params)
    attend = packed_attention(jnp.zeros((1, tokens.shape[0]), jnp.int32))
    hidden, _ = model(tokens[None], jnp.arange(tokens.shape[0])[None], attend, None)
    return jax.nn.log_softmax(model.logits(hidden)[0], axis=-1)


@contextlib.contextmanager
def spilled(
    arrays: Iterator[np.ndarray], folder: Path, tick: Callable[[], None] = lambda: None
) -> Iterator[Iterator[np.ndarray]]:
    """Yields what was iterated over once more, from a file in `folder`; tick() after each array that went there.

    The log-probabilities of both models for a window fit into memory, those of a whole text don't: 24 windows of a
    vocabulary of 128k are 3 GB. Raises ConfigError when the disk has no room.
    """
    count = 0
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            for each in arrays:
                np.save(file, each)
                count += 1
                tick()
            file.seek(0)
        except OSError as error:
            raise ConfigError(
                f"windows: the original's predictions, {file.tell() / 1e9:.2f} GB so far, don't fit into {folder}: "
                f"{error.strerror}; compare fewer"
            ) from None
        yield (np.load(file) for _ in range(count))


def compare(
    original: Iterator[np.ndarray], quantized: Iterator[np.ndarray], texts: np.ndarray, tick: Callable[[], None]
) -> Quality:
    """Both models' `predictions` of the same texts; tick() after each window."""
    kl, same, nats, original_nats = [], [], [], []
    for text, want, got in zip(texts, original, quantized, strict=True):
        kl += [_divergence(want[row : row + ROWS], got[row : row + ROWS]) for row in range(0, len(want), ROWS)]
        same.append(want.argmax(axis=1) == got.argmax(axis=1))
        row = np.arange(len(text) - 1)
        nats.append(-got[row, text[1:]])
        original_nats.append(-want[row, text[1:]])
        tick()

    def mean(parts: list[np.ndarray]) -> float:
        return float(np.concatenate(parts).mean())

    return Quality(
        int(texts.shape[0] * (texts.shape[1] - 1)),
        mean(kl),
        mean(same),
        float(np.exp(mean(nats))),
        float(np.exp(mean(original_nats))),
    )
