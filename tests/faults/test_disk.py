"""A disk that fails costs the steps since the last checkpoint and nothing else, and is said in one line."""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from isthmus.commands.train import main
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.train.data import TrainingData
from isthmus.train.metrics import read_metrics
from isthmus.train.resume import load_saved, save_settings
from tests.faults.conftest import NETWORK, losses, newest_checkpoint, parameters_hash
from tests.support import largest_file

STEPS, EVERY = 24, 8
SETTINGS = (
    *(word for name, size in NETWORK.items() for word in (f"--model.{name}", str(size))),
    *("--text.seq", "64", "--text.vocab-size", "300", "--batch", "4", "--mesh", "dp=1", "--log-every", "5"),
    *("--checkpoint-every", str(EVERY), "--eval-every", "12", "--optimizer.warmup-steps", "3"),
    *("--optimizer.schedule", "wsd", "--optimizer.decay-fraction", "0.25"),
)
CORPUS = argparse.__file__


def run(out: Path, *more: str, steps: int = STEPS) -> int:
    return main([CORPUS, *SETTINGS, "--steps", str(steps), "--out", str(out), *more])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("disk") / "undisturbed"
    assert run(out) == 0
    return out


def assert_same_run(out: Path, reference: Path) -> None:
    assert newest_checkpoint(out) == newest_checkpoint(reference)
    assert losses(out) == losses(reference)
    assert [row.get("lr") for row in read_metrics(out)] == [row.get("lr") for row in read_metrics(reference)]
    assert parameters_hash(out) == parameters_hash(reference)


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines printed, on both streams; a traceback in neither, nor in what was logged."""
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert "Traceback" not in text and "Error(" not in text, text
    return text.splitlines()


@pytest.mark.parametrize(
    "fails_at", [EVERY, *(pytest.param(step, marks=pytest.mark.slow) for step in (2 * EVERY, STEPS))]
)
def test_a_disk_that_is_full_at_a_checkpoint(
    fails_at: int, tmp_path: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first, a later and the last one: the one before stays whole, and --resume is exact once there is room."""
    out, inner = tmp_path / "run", Checkpoints.save

    def save(self: Checkpoints, step: int, *arguments: Any) -> None:
        if step == fails_at:
            self.wait()  # the one before is on disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        inner(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save)
    with largest_file(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):  # which puts it back
        assert run(out) == 1
    error = said(capfd)[-1]
    before = fails_at - EVERY
    kept = f"that of step {before} is whole" if before else "there is no earlier one"
    assert error.startswith(f"isthmus train: the checkpoint of step {fails_at} can't be written in {out}/checkpoints: ")
    assert f"File too large; {kept}; " in error and error.endswith(f"isthmus train --resume --out {out}")
    assert newest_checkpoint(out) == (before or None)
    monkeypatch.undo()
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, undisturbed)
    assert not [path for path in (out / "checkpoints").iterdir() if "tmp" in path.name], "what failed still takes room"


@pytest.mark.parametrize("size", [2000, 9000, 20_000, 50_000])
def test_a_disk_that_is_full_from_the_start(size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """While settings, tokenizer, tokens or the first checkpoint are written."""
    with largest_file(size):
        assert run(tmp_path / "run") == 1
    lines = said(capfd)
    assert lines[-1].startswith("isthmus train: ") and "File too large" in lines[-1] and str(tmp_path) in lines[-1]
    goes_on = (tmp_path / "run" / "train.json").exists()
    assert ("--resume" in lines[-1]) == goes_on
    assert (main(["--resume", "--out", str(tmp_path / "run")]) if goes_on else run(tmp_path / "run")) == 0


def test_settings_are_written_whole_or_not_at_all(undisturbed: Path, tmp_path: Path) -> None:
    """They are written again when a run is lengthened: half of them would lose it."""
    settings = load_saved(undisturbed)
    save_settings(settings, tmp_path)
    before = (tmp_path / "train.json").read_bytes()
    with largest_file(100), pytest.raises(OSError):
        save_settings(settings, tmp_path)
    assert (tmp_path / "train.json").read_bytes() == before and load_saved(tmp_path) == settings


def test_no_room_for_the_curve_is_no_failure(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The model is there."""
    out = shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("loss.png"))
    (out / "loss.png").mkdir()
    assert main(["--resume", "--out", str(out)]) == 0
    assert "no loss curve (Is a directory)" in " ".join(said(capfd))


@pytest.mark.parametrize("damage", ["cut", "emptied", "deleted"])
def test_a_checkpoint_that_was_damaged_is_named(
    damage: str, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By a disk, or by hand: an earlier one may be whole."""
    out = shutil.copytree(undisturbed, tmp_path / "run")
    files = [path for path in (out / "checkpoints" / str(STEPS)).rglob("*") if path.parent.name == "d"]
    assert files
    for path in files:
        if damage == "deleted":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if damage == "cut" else 0)
    assert main(["--resume", "--out", str(out)]) == 1
    (line,) = [line for line in said(capfd) if line.startswith("isthmus train: ")]
    assert f"{out}/checkpoints/{STEPS}" in line and "delete" in line
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, undisturbed)


UNREADABLE = "/proc/self/mem"


@pytest.mark.skipif(not os.path.isfile(UNREADABLE), reason="no /proc")
@pytest.mark.parametrize(
    ("data", "out", "status", "named"),
    [
        (UNREADABLE, "run", 2, f"data: {UNREADABLE}: unreadable: Input/output error"),
        (CORPUS, "/proc/run", 1, "/proc/run: No such file or directory"),
        (CORPUS, "file/run", 1, "file/run: Not a directory"),
        (CORPUS, "file", 1, "file: File exists"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line(
    data: str, out: str, status: int, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The exit status says whose fault it is: 2 the request's, 1 the machine's."""
    (tmp_path / "file").write_text("a file")
    assert main([data, *SETTINGS, "--steps", "1", "--out", str(tmp_path / out)]) == status
    (line,) = [line for line in said(capfd) if line.startswith("isthmus train: ")]
    assert named in line


# a run that becomes longer


def interrupted(out: Path, at: int, monkeypatch: pytest.MonkeyPatch, *more: str, steps: int = STEPS) -> Path:
    """A run that ends at step `at` without saving it; the checkpoints before it are whole."""
    inner = TrainingData.batch

    def batch(self: TrainingData, step: int, *arguments: int) -> Any:
        if step == at:
            raise KeyboardInterrupt
        return inner(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            run(out, *more, steps=steps)
    return out


def test_a_run_that_is_stopped_while_it_is_evaluated_has_all_its_steps(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation reads all held-out text, for minutes: Ctrl-C there threw away what had been trained since the
    checkpoint before."""
    out = tmp_path / "run"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("isthmus.train.loop._Run._final_heldout", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(out, "--checkpoint-every", "1000")
    assert newest_checkpoint(out) == STEPS
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, undisturbed)


def test_a_lengthened_run_is_the_longer_run(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and after another stop too: a warmup-stable-decay schedule has no length until it decays."""
    out = interrupted(tmp_path / "run", 11, monkeypatch, steps=14)
    assert newest_checkpoint(out) == 8
    assert main(["--resume", "--steps", str(STEPS), "--out", str(out)]) == 0
    assert_same_run(out, undisturbed)
    assert load_saved(out).steps == STEPS and main(["--resume", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("schedule", "steps", "named"),
    [
        ("wsd", 100, r"steps can't change from 24 to 100 .* of step 20, .* the same up to step 1[89] only"),
        ("wsd", 16, r"steps can't change from 24 to 16 .*: 20 are done"),
        ("cosine", 100, r"steps can't change from 24 to 100 .* cosine .* --optimizer\.schedule wsd can be lengthened"),
    ],
)
def test_a_run_that_cannot_be_lengthened_says_why(
    schedule: str, steps: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Past the point where the lengths part, what comes out would be neither run."""
    more = ("--optimizer.schedule", schedule, "--checkpoint-every", "20")
    out = interrupted(tmp_path / "run", 21, monkeypatch, *more)
    before = (out / "train.json").read_bytes()
    capsys.readouterr()
    assert main(["--resume", "--steps", str(steps), "--out", str(out)]) == 2
    assert re.search(named, capsys.readouterr().out)
    assert (out / "train.json").read_bytes() == before
