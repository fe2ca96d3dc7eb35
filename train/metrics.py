"""Where a run's figures go: metrics.jsonl, TensorBoard, and a loss curve for the terminal and as a PNG."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

FLUSH_SECONDS = 30.0
"""Least time between two flushes of TensorBoard's file"""


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard's event files. A resumed run first drops the rows after `step`.

    A failing disk doesn't end the run. The rows of metrics.jsonl wait in memory, and each write tries again;
    TensorBoard's file ends there.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        """warn(text) is called once for each file that fails later. Raises OSError if the files can't be made."""
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self._file = path.open("ab", buffering=0)
        self._written = path.stat().st_size
        self._pending = b""
        self._warn, self._failed = warn, False
        self._board: _Board | None = _Board(folder / "tensorboard", step + 1 if step else None)

    def write(self, step: int, **values: float) -> None:
        self._pending += json.dumps({"step": step, **values}).encode() + b"\n"
        self._append()
        try:
            if self._board:
                self._board.write(step, values)
        except OSError as error:
            self._drop_board(error)

    def _append(self) -> None:
        """Writes the pending rows whole or not at all, because half a row would hide those after it."""
        try:
            written = self._file.write(self._pending)
            if written < len(self._pending):
                self._file.write(self._pending[written:])
        except OSError as error:
            self._file.truncate(self._written)
            if not self._failed:
                self._warn(f"metrics.jsonl can't be written ({error.strerror}): its rows wait in memory")
            self._failed = True
        else:
            self._written += len(self._pending)
            self._pending, self._failed = b"", False

    def _drop_board(self, error: OSError) -> None:
        self._warn(f"TensorBoard's file can't be written ({error.strerror}) and ends here")
        board, self._board = self._board, None
        if board:
            with contextlib.suppress(OSError):
                board.close()

    def close(self) -> None:
        if self._pending:
            self._append()
        if self._pending:
            self._warn(f"{self._pending.count(10)} rows of metrics.jsonl are lost")
        self._file.close()
        try:
            if self._board:
                self._board.close()
        except OSError as error:
            self._drop_board(error)


class _Board:
    """TensorBoard's event file. The caller's thread writes it, so that the caller learns of errors. tensorboardX's own
    writer has a thread that an error ends, and a queue that then blocks."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        """purge_step: the step from which on earlier files no longer count; None means that they all do."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._writer, self._event, self._scalar = RecordWriter(str(folder / name)), Event, scalar
        self._flushed = time.monotonic()
        self._put(file_version="brain.Event:2")
        if purge_step is not None:
            self._put(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def _put(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._put(step=step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a model folder's metrics.jsonl; an incomplete last line is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _curves(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and losses by the curve's name; each point of the training loss is a mean over a hundredth of the run."""
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
    plotext.title("loss, nats per token")
    plotext.xlabel("step")
    picture = plotext.build()
    return picture if color else plotext.uncolorize(picture)


def save_curve(folder: Path) -> Path:
    """Saves the loss curve as FOLDER/loss.png and returns that path."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if there is no home folder for its cache
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (label, (steps, losses)), style in zip(_curves(folder).items(), ("-", "o-"), strict=True):
        axes.plot(steps, losses, style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=f"Training {folder.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
