"""Rows that wait for a disk: none is torn, none is lost, and nothing blocks."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from isthmus.train.metrics import MetricsLog, read_metrics
from tests.support import largest_file


def test_rows_wait_for_a_disk_and_come_whole(tmp_path: Path) -> None:
    """Half a row hides all that are written after it."""
    said: list[str] = []
    log = MetricsLog(tmp_path, 0, said.append)
    for step in range(1, 4):
        log.write(step, loss=1 / step)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with largest_file(size + 10):
        for step in range(4, 9):
            log.write(step, loss=1 / step)
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
    log.write(9, loss=1 / 9)
    log.close()
    assert read_metrics(tmp_path) == [{"step": step, "loss": 1 / step} for step in range(1, 10)]
    assert said == ["metrics.jsonl can't be written (File too large): its rows wait in memory"]


def test_rows_that_never_found_room_are_counted(tmp_path: Path) -> None:
    """And the checkpoints, which matter more, go on: nothing is raised."""
    said: list[str] = []
    log = MetricsLog(tmp_path, 0, said.append)
    log.write(1, loss=1.0)
    with largest_file(40):
        for step in range(2, 400):  # more than TensorBoard's buffer holds
            log.write(step, loss=1.0, grad_norm=2.0, lr=3.0)
        log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert [text.split()[0] for text in said] == ["metrics.jsonl", "TensorBoard's", "398"]


def events(folder: Path) -> list[Event]:
    """What TensorBoard reads: records of a length, its checksum, the data, its checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_has_each_value_and_forgets_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, print)
    for step in 1, 2, 3:
        log.write(step, loss=step / 2, lr=0.25)
    log.close()
    first = events(tmp_path)
    assert first[0].file_version == "brain.Event:2"
    got = [(event.step, value.tag, value.simple_value) for event in first for value in event.summary.value]
    assert got == [(step, tag, value) for step in (1, 2, 3) for tag, value in (("loss", step / 2), ("lr", 0.25))]
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()
    log = MetricsLog(tmp_path, 2, print)
    log.write(3, loss=9.0)
    log.close()
    start = [event for event in events(tmp_path) if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in start] == [(3, 1)]
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()] == [0.5, 1.0, 9.0]


def test_a_curve_needs_no_home(tmp_path: Path) -> None:
    """Containers have none, or one that is read-only."""
    log = MetricsLog(tmp_path, 0, print)
    for step in range(1, 4):
        log.write(step, loss=1 / step)
    log.close()
    code = f"import pathlib; from isthmus.train.metrics import save_curve; save_curve(pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "HOME": "/proc/nowhere"}
    for name in "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR":
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
