"""Medians and percentiles, as every benchmark reports them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """A sample of measurements, in the unit they came in."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float


def summarize(values: Sequence[float]) -> Summary:
    """Percentiles interpolate linearly between order statistics. An empty sample is all NaN."""
    if not len(values):
        return Summary(0, *[float("nan")] * 6)
    array = np.asarray(values, np.float64)
    p50, p90, p99 = (float(p) for p in np.percentile(array, (50, 90, 99)))
    return Summary(len(array), float(array.mean()), float(array.min()), p50, p90, p99, float(array.max()))


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, no exponent; a dash for what there is none of."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percentiles(summary: Mapping[str, float | None], factor: float) -> str:
    """p50 / p90 / p99 of a Summary's fields, times `factor`."""
    values = (summary[name] for name in ("p50", "p90", "p99"))
    return " / ".join(number(None if value is None else value * factor) for value in values)
