"""What integers cost a model's predictions: measured of a folder when it was made, and of a few known models."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.process.files import read_json_if_present

FILE = "quality.json"
"""In a quantized folder"""

KNOWN = Path(__file__).with_name("costs.json")
"""{scheme: {dtype: {model: fields of Cost}}}, written by scripts/write_costs.py from benchmarks/results"""

INTERVAL = 1.96
"""Standard errors on either side of a mean that make a 95% interval"""


@dataclass(frozen=True)
class Cost:
    """How far a quantized model's predictions are from the original's, served in float32 with a float32 cache."""

    kl: float
    """Mean KL divergence, nats a token"""
    kl_error: float | None
    """Its standard error, a text's windows taken as independent; None isn't known, and so below"""
    ratio: float
    """Of the perplexities, the quantized model's by the original's"""
    ratio_error: float | None
    """Standard error of its logarithm"""
    top1: float
    """Share of tokens where both have the same likeliest next one"""
    tokens: int
    dtype: str
    """That it was measured in"""
    cache_dtype: str

    def text(self) -> str:
        percent = None if self.ratio_error is None else 100 * self.ratio * self.ratio_error
        return (
            f"KL {self.kl:.2g}{margin(self.kl_error)} nats a token, the same likeliest token {self.top1:.1%}, "
            f"perplexity {100 * (self.ratio - 1):+.2f}{margin(percent)}%"
        )


@dataclass(frozen=True)
class MeasuredCost(Cost):
    """As a folder keeps it."""

    quantize: str
    """The scheme or rules that were asked for"""
    source: str
    """Of the text"""
    perplexity: float
    original_perplexity: float
    windows: int
    platform: str
    date: str

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def measured(folder: Path) -> MeasuredCost | None:
    """None where there is none, or none that can be read: nothing depends on it."""
    try:
        cost = MeasuredCost(**read_json_if_present(folder / FILE))
        cost.text()
    except (ConfigError, TypeError, ValueError):
        return None
    numbers = (cost.tokens, cost.windows)
    return cost if all(type(number) is int for number in numbers) else None


def known(scheme: str, dtype: str) -> dict[str, Cost]:
    """By model, what `isthmus bench quality` measured of a scheme in a dtype."""
    rows = _table().get(scheme, {}).get(dtype, {})
    return {model: Cost(**fields) for model, fields in rows.items()}


@cache
def _table() -> dict[str, Any]:
    return read_json_if_present(KNOWN)


def margin(error: float | None) -> str:
    """Half of a figure's 95% interval, in its unit, where its standard error is known."""
    return "" if error is None or math.isnan(error) else f" ± {INTERVAL * error:.1g}"
