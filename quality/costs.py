"""What integers cost in a model's predictions: measured for a folder when it was made, and for a few known models."""

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
"""The file in a quantized folder that holds its MeasuredCost"""

KNOWN = Path(__file__).with_name("costs.json")
"""{scheme: {dtype: {model: fields of Cost}}}, written by scripts/write_costs.py from benchmarks/results"""

INTERVAL = 1.96
"""A 95% interval is this many standard errors on either side of the mean"""


@dataclass(frozen=True)
class Cost:
    """How far a quantized model's predictions are from the original's, served in float32 with a float32 cache."""

    kl: float
    """Mean KL divergence, nats per token"""
    kl_error: float | None
    """Standard error of `kl`, with windows taken as independent; None if it isn't known"""
    ratio: float
    """The quantized model's perplexity divided by the original's"""
    ratio_error: float | None
    """Standard error of the logarithm of `ratio`; None if it isn't known"""
    top1: float
    """Share of tokens for which both models have the same most likely next token"""
    tokens: int
    dtype: str
    """The dtype in which the quantized model was measured"""
    cache_dtype: str

    def text(self) -> str:
        percent = None if self.ratio_error is None else 100 * self.ratio * self.ratio_error
        return (
            f"KL {self.kl:.2g}{margin(self.kl_error)} nats per token, the same likeliest token {self.top1:.1%}, "
            f"perplexity {100 * (self.ratio - 1):+.2f}{margin(percent)}%"
        )


@dataclass(frozen=True)
class MeasuredCost(Cost):
    """The cost of one quantized folder, as its quality.json holds it."""

    quantize: str
    """The scheme or rules that were asked for"""
    source: str
    """Where the text came from"""
    perplexity: float
    original_perplexity: float
    windows: int
    platform: str
    date: str

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def measured(folder: Path) -> MeasuredCost | None:
    """The cost in a folder's quality.json; None if there is none or it can't be read, since nothing depends on it."""
    try:
        cost = MeasuredCost(**read_json_if_present(folder / FILE))
        cost.text()
    except (ConfigError, TypeError, ValueError):
        return None
    numbers = (cost.tokens, cost.windows)
    return cost if all(type(number) is int for number in numbers) else None


def known(scheme: str, dtype: str) -> dict[str, Cost]:
    """By model, what `isthmus bench quality` measured for a scheme in a dtype."""
    rows = _table().get(scheme, {}).get(dtype, {})
    return {model: Cost(**fields) for model, fields in rows.items()}


@cache
def _table() -> dict[str, Any]:
    return read_json_if_present(KNOWN)


def margin(error: float | None) -> str:
    """Half of a figure's 95% interval, in its unit, as text; empty if its standard error isn't known."""
    return "" if error is None or math.isnan(error) else f" ± {INTERVAL * error:.1g}"
