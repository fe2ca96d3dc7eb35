"""Compares a quantized model, as it is served, with the original that it was made from: how far its predictions moved,
and whether that is too far."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.weights.folder import ModelFolder
from isthmus.quality.costs import INTERVAL, Cost
from isthmus.quality.divergence import LEAST_LOG_PROBABILITY, ROWS, Gathered, Quality, log_softmax
from isthmus.serve.engine.predictions import predictions

BOUNDS: dict[int, tuple[float, float]] = {8: (0.01, 1.01), 6: (0.02, 1.02), 5: (0.05, 1.05), 4: (0.12, 1.10)}
"""By the fewest bits of a model's integers: the largest KL divergence, in nats per token, and the largest factor by
which perplexity may grow, unless the conversion is forced"""

NEVER = -100.0
"""Stands for a log-probability so small that it doesn't count"""


def passes(quality: Quality, bits: int) -> bool:
    """Whether the mean KL divergence and the perplexity are within the bounds."""
    most_kl, most_ratio = BOUNDS[bits]
    return quality.kl <= most_kl and quality.ratio <= most_ratio


def undecided(quality: Quality, bits: int) -> bool:
    """Whether other text of as many windows could well be judged differently. It could if the bound that is closest to
    being broken, or is broken the most, lies in the 95% interval of its figure. Always True for a single window."""
    most_kl, most_ratio = BOUNDS[bits]
    room = np.array([most_kl - quality.kl, math.log(most_ratio / quality.ratio)])
    with np.errstate(divide="ignore", invalid="ignore"):
        least = (room / [quality.kl_window_error, quality.ratio_window_error]).min()
    return not abs(least) > INTERVAL


def bounds(bits: int) -> str:
    most_kl, most_ratio = BOUNDS[bits]
    return f"KL {most_kl} and perplexity {most_ratio - 1:+.0%}"


def described(quality: Quality) -> str:
    """The figures as text, with 95% intervals."""
    return (
        f"{cost(quality, '', '').text()} ({quality.perplexity:.4g}, before {quality.base_perplexity:.4g}), over "
        f"{quality.tokens:,} tokens in {quality.windows} windows; ± is the 95% interval"
    )


def cost(quality: Quality, dtype: str, cache_dtype: str) -> Cost:
    kl_error, ratio_error = (
        None if math.isnan(error) else error for error in (quality.kl_window_error, quality.ratio_window_error)
    )
    return Cost(quality.kl, kl_error, quality.ratio, ratio_error, quality.top1, quality.tokens, dtype, cache_dtype)


class KeptPredictions:
    """The log-probabilities of windows, kept in a file that can be read any number of times. Those that count for the
    divergence, and those of the tokens that came, are kept in full; all others are read as NEVER.

    The predictions of both models for one window fit into memory, but those of one model for a whole text don't: 64
    windows of 255 tokens and a vocabulary of 128k are 8.4 GB.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._count = file, 0

    def add(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """Adds a window. logits: float32[tokens, vocab]; targets: int32[tokens], the tokens that came."""
        for row in range(0, len(targets), ROWS):
            values = log_softmax(logits[row : row + ROWS])
            kept = values > LEAST_LOG_PROBABILITY
            kept[np.arange(len(kept)), targets[row : row + ROWS]] = True
            np.save(self._file, np.packbits(kept, axis=1))
            np.save(self._file, values[kept])
        self._shape = logits.shape
        self._count += 1

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields float32[tokens, vocab] for each window."""
        self._file.seek(0)
        for _ in range(self._count):
            window = np.full(self._shape, NEVER, np.float32)
            for row in range(0, len(window), ROWS):
                part = window[row : row + ROWS]
                kept = np.unpackbits(np.load(self._file), axis=1, count=part.shape[1]).view(bool)
                part[kept] = np.load(self._file)
            yield window


@contextlib.contextmanager
def original_kept(
    original: ModelFolder, windows: np.ndarray, folder: Path, on_progress: Callable[[], None]
) -> Iterator[KeptPredictions]:
    """Yields the original's predictions for int32[windows, size], served in its dtype and with a cache of that dtype.
    They are kept in a file without a name in `folder`. on_progress() is called after each window. Raises ConfigError
    when the disk has no room."""
    first = windows.shape[1] // 2
    with tempfile.TemporaryFile(dir=folder) as file:
        kept = KeptPredictions(file)
        for window, logits in zip(windows, predictions(original, "model", windows, first), strict=True):
            try:
                kept.add(logits, window[first + 1 :])
                file.flush()
            except OSError as error:
                raise ConfigError(
                    f"windows: the original's predictions, {file.tell() / 1e9:.2f} GB so far, don't fit into {folder}: "
                    f"{error.strerror}; compare fewer"
                ) from None
            on_progress()
        yield kept


def compare(
    original: Iterable[np.ndarray],
    quantized: ModelFolder,
    cache_dtype: str,
    windows: np.ndarray,
    on_progress: Callable[[], None],
) -> Quality:
    """Compares the predictions of `quantized` with those of the original for int32[windows, size].

    original: log-probabilities of these windows, perhaps followed by those of more. quantized: as open_model opens it,
    in the dtype in which it is to be served. on_progress() is called after each window.
    """
    first, gathered = windows.shape[1] // 2, Gathered()
    got = predictions(quantized, cache_dtype, windows, first)
    for window, want, logits in zip(windows, original, got, strict=False):
        gathered.add(want, logits, window[first + 1 :])
        on_progress()
    return gathered.quality()
