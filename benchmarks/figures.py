"""Statistics of samples, and figures as text: the Markdown of a result in the report and on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.benchmarks.record import Record


def summarize(values: Sequence[float]) -> dict[str, float]:
    """count, mean, min, p50, p90, p99 and max. Percentiles interpolate linearly between order statistics. An empty
    sample is all NaN."""
    array = np.asarray(values if len(values) else [np.nan], np.float64)
    names = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    found = dict(zip(names, map(float, np.percentile(array, list(names.values()))), strict=True))
    return {"count": len(values), "mean": float(array.mean()), **found}


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


PAIRED = "A ratio is the median of the repetitions' own ratios, so it needn't be that of the medians beside it."
OF_MEDIANS = "A ratio is that of the medians."
"""What a table says of its ratios"""


def number(value: float | None, digits: int = 3) -> str:
    """A number as text, with at least `digits` significant digits if it has as many; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def percentiles(
    summary: Mapping[str, float | None], factor: float, names: Sequence[str] = ("p50", "p90", "p99")
) -> str:
    """The named percentiles of a summary by `summarize`, times `factor`, as text."""
    return " / ".join(number(None if (value := summary[name]) is None else value * factor) for name in names)


def bucket_label(row: dict[str, int], sign: str) -> str:
    """A bucket as text: its rows and, after `sign`, its blocks of prompt if it has any."""
    return f"{row['rows']}{sign}{row['blocks']}x{row['block_size']}" if row["blocks"] else str(row["rows"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but its first column flush right."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows))


def table_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """A Markdown table with a line for each row. columns: by heading, what returns the text of a row's cell."""
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def listed(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def paragraphs(*parts: str) -> str:
    """The parts that aren't empty, with an empty line between each two."""
    return "\n\n".join(part for part in parts if part)


def machine_line(record: Record) -> str:
    """What the record was measured on, and when."""
    machine, limits = record.machine, record.figures.get("limits")
    measured = ""
    if limits:
        bandwidth, flops = f"{limits['bandwidth'] / 1e9:.1f} GB/s", f"{limits['flops'] / 1e9:,.0f} GFLOP/s"
        measured = f"{bandwidth}, {flops} ({limits['source']}); "
    return (
        f"{machine.device}, {machine.cores} cores; {measured}jax {machine.jax}, Python "
        f"{machine.python}; {machine.date}, commit {machine.commit or 'unknown'}, load before the run {machine.load:g}."
    )
