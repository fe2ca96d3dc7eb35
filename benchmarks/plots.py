"""PNG plots of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.record import Record

MEASURED, LIMIT = "#2f6f9f", "#c9c9c9"
LATENCIES = (
    ("ttft", "time to first token, ms", 1e3),
    ("itl", "between tokens, ms", 1e3),
    ("e2e", "whole request, s", 1.0),
)


def plot_steps(record: Record, path: Path) -> None:
    """Bars of measured and least time for each bucket, on a logarithmic scale."""
    buckets = record.figures["buckets"]
    names = [
        f"{row['rows']}+{row['blocks']}x{row['block_size']}" if row["blocks"] else str(row["rows"]) for row in buckets
    ]
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    at = range(len(buckets))
    measured = axes.bar([i - 0.2 for i in at], [row["seconds"] * 1e3 for row in buckets], 0.4, color=MEASURED)
    axes.bar([i + 0.2 for i in at], [row["limit_seconds"] * 1e3 for row in buckets], 0.4, color=LIMIT)
    axes.bar_label(measured, [f"{row['limit_share']:.0%}" for row in buckets], fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(list(at), names)
    axes.set_xlabel("decoding rows + blocks of prompt")
    axes.set_ylabel("ms a step")
    axes.legend(["measured, and its share of the limit", "limit of memory and arithmetic"], frameon=False)
    axes.set_title(_title(record), fontsize=10)
    _finish(figure, path)


def plot_rates(record: Record, path: Path) -> None:
    """Latency percentiles against the arrival rate, one panel a latency."""
    rows = sorted(record.figures["rates"], key=lambda row: row["rate"])
    figure, panels = pyplot.subplots(1, len(LATENCIES), figsize=(12, 3.8), layout="constrained")
    for axes, (name, label, factor) in zip(panels, LATENCIES, strict=True):
        for percentile, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            points = [(row["rate"], row[name][percentile]) for row in rows if row[name][percentile] is not None]
            axes.plot([x for x, _ in points], [y * factor for _, y in points], style, marker="o", color=MEASURED)
        axes.set_yscale("log")
        axes.set_xlabel("requests a second")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].legend(["p50", "p90", "p99"], frameon=False)
    figure.suptitle(_title(record), fontsize=10)
    _finish(figure, path)


def _title(record: Record) -> str:
    return f"{record.subject} on {record.machine.device}, {record.machine.cores} cores, {record.machine.platform}"


def _finish(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
