"""Requests as independent users send them: Poisson arrivals, and lengths like ShareGPT's, all drawn from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from isthmus.errors import ConfigError


@dataclass(frozen=True)
class Lengths:
    """Lognormal lengths of prompts and completions.

    The means are those of ShareGPT in Kwon et al. (2023, "Efficient Memory Management for Large Language Model Serving
    with PagedAttention", arXiv 2309.06180, figure 11). The paper gives no spread; ours is 1, for a long tail and a
    median of 0.61 times the mean. The prompts' tokens are random, so no two requests share a prefix.
    """

    prompt_mean: float = 161.31
    """Mean number of tokens of a prompt"""
    output_mean: float = 337.99
    """Mean number of tokens of a completion"""
    spread: float = 1.0
    """Standard deviation of a length's logarithm; 0 makes all lengths alike"""
    scale: float = 1.0
    """Factor for both means; less than 1 makes a shorter run on a slow machine"""

    def validate(self) -> None:
        """Raises ConfigError naming the field."""
        for name in ("prompt_mean", "output_mean", "scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"lengths.{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.spread <= 4:
            raise ConfigError(f"lengths.spread={self.spread} must be 0 to 4")

    def draw(self, random: np.random.Generator, count: int, context: int) -> list[tuple[int, int]]:
        """(prompt, completion) tokens of `count` requests: a prompt is cut to half of the context, a completion to what
        is left of it."""
        prompts = self._lognormal(random, self.prompt_mean, count)
        outputs = self._lognormal(random, self.output_mean, count)
        pairs = []
        for prompt, output in zip(prompts, outputs, strict=True):
            first = int(np.clip(round(prompt), 1, context // 2))
            pairs.append((first, int(np.clip(round(output), 1, context - first))))
        return pairs

    def _lognormal(self, random: np.random.Generator, mean: float, count: int) -> np.ndarray:
        """float64[count] numbers whose mean, before rounding and cutting, is mean * scale."""
        median = mean * self.scale / math.exp(self.spread**2 / 2)
        return median * np.exp(self.spread * random.standard_normal(count))


@dataclass(frozen=True)
class PlannedRequest:
    """A request before it is sent."""

    at: float
    """When it is due, in seconds after the start"""
    prompt: list[int]
    max_tokens: int
    seed: int


def poisson_arrivals(random: np.random.Generator, rate: float, seconds: float) -> list[float]:
    """Arrival times in [0, seconds) of a Poisson process of `rate` per second."""
    times: list[float] = []
    now = random.exponential(1 / rate)
    while now < seconds:
        times.append(float(now))
        now += random.exponential(1 / rate)
    return times


def open_loop(
    seed: int, rate: float, seconds: float, lengths: Lengths, vocab: int, context: int
) -> list[PlannedRequest]:
    """Poisson arrivals with drawn lengths; at least one request."""
    random = np.random.default_rng([seed, round(rate * 1e6)])
    return _requests(random, poisson_arrivals(random, rate, seconds) or [0.0], lengths, vocab, context)


def all_at_once(seed: int, round_: int, count: int, lengths: Lengths, vocab: int, context: int) -> list[PlannedRequest]:
    """`count` requests at time 0, others in each round, so that no round's prompts are in the prefix cache."""
    return _requests(np.random.default_rng([seed, 1 << 32, round_]), [0.0] * count, lengths, vocab, context)


def _requests(
    random: np.random.Generator, times: list[float], lengths: Lengths, vocab: int, context: int
) -> list[PlannedRequest]:
    pairs = lengths.draw(random, len(times), context)
    return [
        PlannedRequest(at, random.integers(0, vocab, prompt).tolist(), output, int(random.integers(1 << 32)))
        for at, (prompt, output) in zip(times, pairs, strict=True)
    ]
