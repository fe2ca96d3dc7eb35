"""Where a run's figures go: metrics.jsonl, TensorBoard, and a loss curve for the terminal and as PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard's event files. A resumed run first drops what came after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self._path)
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, **values: float) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a model folder's metrics.jsonl; a torn last line is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _curves(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and losses; the training loss in means of a hundredth of the run."""
    rows = read_metrics(folder)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    size = max(1, len(train) // 100)
    means = [tuple(map(fmean, zip(*train[i : i + size], strict=True))) for i in range(0, len(train), size)]
    return {"train": _columns(means), "held out": _columns(held)}


def _columns(points: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def terminal_curve(folder: Path, width: int = 78, height: int = 16, *, color: bool = True) -> str:
    """The loss curve as text, with ANSI colours or without."""
    import plotext

    plotext.clear_figure()
    for label, (steps, losses) in _curves(folder).items():
        if steps:
            plotext.plot(steps, losses, label=label)
    plotext.plotsize(width, height)
    plotext.theme("clear")
    plotext.title("loss, nats a token")
    plotext.xlabel("step")
    picture = plotext.build()
    return picture if color else plotext.uncolorize(picture)


def save_curve(folder: Path) -> Path:
    """The loss curve as FOLDER/loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (label, (steps, losses)), style in zip(_curves(folder).items(), ("-", "o-"), strict=True):
        axes.plot(steps, losses, style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=f"Training {folder.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
