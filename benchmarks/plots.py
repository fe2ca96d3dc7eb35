"""Plots of records, as matplotlib figures that the caller closes."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from isthmus.benchmarks import comparison
from isthmus.benchmarks.figures import bucket_label, median
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.stacks import CLASSES, STACKS

MEASURED, LIMIT, OTHER = "#2f6f9f", "#c9c9c9", "#8a8a8a"
LATENCIES = (
    ("ttft", "time to first token, ms", 1e3),
    ("itl", "between tokens, ms", 1e3),
    ("e2e", "whole request, s", 1.0),
)


def plot_steps(record: Record) -> Figure:
    """Bars of measured and least time for each bucket, on a logarithmic scale."""
    buckets = record.figures["buckets"]
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    at = range(len(buckets))
    measured = axes.bar([i - 0.2 for i in at], [row["seconds"] * 1e3 for row in buckets], 0.4, color=MEASURED)
    axes.bar([i + 0.2 for i in at], [row["limit_seconds"] * 1e3 for row in buckets], 0.4, color=LIMIT)
    axes.bar_label(measured, [f"{row['limit_share']:.0%}" for row in buckets], fontsize=8)
    axes.set(yscale="log", xlabel="decoding rows + blocks of prompt", ylabel="ms per step")
    axes.set_xticks(list(at), [bucket_label(row, "+") for row in buckets])
    axes.legend(["measured, and its share of the limit", "limit of memory and arithmetic"], frameon=False)
    axes.set_title(_title(record), fontsize=10)
    return figure


def plot_rates(record: Record) -> Figure | None:
    """Latency percentiles against the arrival rate, with a panel for each latency; None where no rate was measured."""
    rows = sorted(record.figures["rates"], key=lambda row: row["rate"])
    if not rows:
        return None
    figure, panels = pyplot.subplots(1, len(LATENCIES), figsize=(12, 3.8), layout="constrained")
    for axes, (name, label, factor) in zip(panels, LATENCIES, strict=True):
        for percentile, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            points = [(row["rate"], row[name][percentile]) for row in rows if row[name][percentile] is not None]
            axes.plot([x for x, _ in points], [y * factor for _, y in points], style, marker="o", color=MEASURED)
        axes.set(yscale="log", xlabel="requests per second", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend(["p50", "p90", "p99"], frameon=False)
    figure.suptitle(_title(record), fontsize=10)
    return figure


def plot_comparison(record: Record) -> Figure:
    """Bars of tokens per second, with a panel for each cell. Stacks are grouped by the bits of their weights; above
    Isthmus' bar stands its ratio to the fastest peer of the group."""
    found = comparison.newest(record.figures["pieces"])
    ratios = {(row["cell"], row["ours"]): row["ratio"] for row in record.figures["compared"]}
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    size = (8.5 * columns, 3.6 * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat[len(found) :]:
        axes.axis("off")
    for axes, (cell, rates) in zip(panels.flat, found.items(), strict=False):
        placed = sorted(((name, CLASSES.index(STACKS[name].weights)) for name in rates), key=lambda pair: pair[1])
        names = [name for name, _ in placed]
        at = [index + 0.6 * group for index, (_, group) in enumerate(placed)]
        colors = [MEASURED if STACKS[name].engine == "isthmus" else LIMIT for name in names]
        bars = axes.bar(at, [median(rates[name]) for name in names], color=colors)
        texts = [f"{ratios[cell, name]:.2f}x" if (cell, name) in ratios else "" for name in names]
        axes.bar_label(bars, texts, fontsize=9, fontweight="bold")
        axes.set_xticks(at, [name.replace("-", "\n") for name in names], fontsize=6.5)
        axes.set_ylabel("tok/s")
        axes.margins(y=0.12)
        axes.set_title(comparison.label(cell), fontsize=9)
    figure.suptitle(_title(record), fontsize=10)
    return figure


def plot_quality(record: Record) -> Figure:
    """KL divergence, on a logarithmic scale, against bytes: a point to the left of another and below it is better."""
    figure, axes = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    for color, label, is_ours in ((MEASURED, "Isthmus", True), (OTHER, "llama.cpp", False)):
        rows = [row for row in record.figures["rows"] if row["name"].startswith("isthmus-") == is_ours]
        at = [row["bytes"] / 1e6 for row in rows]
        errors = [row["kl_error"] for row in rows]
        axes.errorbar(at, [row["kl"] for row in rows], errors, fmt="o", color=color, capsize=2, label=label)
        for x, row in zip(at, rows, strict=True):
            name = row["name"].partition("-")[2]
            axes.annotate(name, (x, row["kl"]), xytext=(5, 4), textcoords="offset points", fontsize=8, color=color)
    axes.set(yscale="log", xlabel="weights, MB", ylabel="KL divergence from float32, nats per token")
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.12)
    axes.legend(frameon=False)
    axes.set_title(record.subject, fontsize=10)
    return figure


def _title(record: Record) -> str:
    return f"{record.subject} on {record.machine.device}, {record.machine.cores} cores, {record.machine.platform}"
