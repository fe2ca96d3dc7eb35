"""Exact: a run that was killed, interrupted and resumed is, bit for bit, the run that never stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from isthmus.commands.train import main
from isthmus.train.config import TrainConfig
from isthmus.train.step import Trainer
from tests.faults.conftest import (
    CHECKPOINT_EVERY,
    SETTINGS,
    STEPS,
    Interrupted,
    StartTraining,
    losses,
    newest_checkpoint,
    parameters_hash,
)

KILLS = 3


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def _saved(out: Path) -> Path:
    """A folder that holds a run's settings."""
    out.mkdir()
    (out / "train.json").write_text(TrainConfig(data=("corpus.txt",), out=out).to_json())
    return out


def assert_same_run(out: Path, reference: Path) -> None:
    assert newest_checkpoint(out) == newest_checkpoint(reference) == STEPS
    assert losses(out) == losses(reference)
    assert parameters_hash(out) == parameters_hash(reference)


def test_an_undisturbed_run_writes_every_step_once(reference: Path) -> None:
    """Else the comparisons below compare nothing."""
    steps = [step for step, kind, _ in losses(reference) if kind == "loss"]
    assert steps == list(range(1, STEPS + 1))
    assert [step for step, kind, _ in losses(reference) if kind == "heldout_loss"] == [30, 60, STEPS]
    first, last = losses(reference)[0][2], losses(reference)[-1][2]
    assert last < first - 0.5, "it learned nothing"


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_it_is_the_same_run(
    start_training: StartTraining, tmp_path: Path, reference: Path, corpus: Path
) -> None:
    """kill -9, again and again, in the middle of whatever it does: steps, saves, evaluations."""
    dice, out, arguments = random.Random(7), tmp_path / "killed", (str(corpus), *SETTINGS)
    targets = sorted(dice.sample(range(2, STEPS - CHECKPOINT_EVERY), KILLS))
    for target in targets:
        run = start_training(out, *arguments)
        run.wait_for_step(target)
        run.process.kill()
        run.output()
        assert run.process.returncode == -signal.SIGKILL, "it was done before it was killed"
        arguments = ("--resume",)
    printed = start_training(out, "--resume").finish()
    assert "resumed at step" in printed
    assert_same_run(out, reference)


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_it_starts_again(
    start_training: StartTraining, tmp_path: Path, reference: Path, corpus: Path
) -> None:
    """There is nothing to go on from, and still --resume gets there."""
    run = start_training(tmp_path / "early", str(corpus), *SETTINGS, "--checkpoint-every", str(STEPS))
    run.wait_for_step(1)
    run.process.kill()
    run.output()
    assert "starting from step 0" in start_training(run.out, "--resume").finish()
    assert_same_run(run.out, reference)


def test_ctrl_c_saves_and_says_how_to_go_on(interrupted: Interrupted) -> None:
    step = newest_checkpoint(interrupted.out)
    assert step is not None and STEPS // 3 <= step < STEPS
    assert f"stopped at step {step}, checkpoint saved" in interrupted.printed
    assert "--resume" in interrupted.printed and "Traceback" not in interrupted.printed
    assert [row for row in losses(interrupted.out) if row[1] == "loss"][-1][0] == step


def test_ctrl_c_in_the_last_evaluation_says_how_to_go_on(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps are done and saved, and one word, stopped, looks like the loss of an hour's work."""
    out, evaluate = tmp_path / "run", Trainer.evaluate

    def interrupting(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupting)
        assert main([str(corpus), *SETTINGS, "--steps", "3", "--eval-every", "0", "--out", str(out)]) == 130
    said = _said(capsys)
    assert "stopped at step 3, checkpoint saved; go on with: isthmus train --resume" in said
    assert newest_checkpoint(out) == 3
    assert main(["--resume", "--out", str(out)]) == 0
    assert "done: held-out loss" in _said(capsys)


def test_after_ctrl_c_it_goes_on_as_if_it_had_never_stopped(
    start_training: StartTraining, tmp_path: Path, interrupted: Interrupted, reference: Path
) -> None:
    """Also from another folder, with checkpoints at other steps."""
    out = shutil.copytree(interrupted.out, tmp_path / "moved")
    printed = start_training(out, "--resume", "--checkpoint-every", "1000").finish()
    assert f"resumed at step {newest_checkpoint(interrupted.out)}" in printed
    assert_same_run(out, reference)


def test_resuming_a_run_that_is_done_changes_nothing(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(reference, tmp_path / "done")
    assert main(["--resume", "--out", str(out)]) == 0, _said(capsys)
    assert_same_run(out, reference)


def test_resuming_on_other_text_is_refused(
    interrupted: Interrupted, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was edited since is other data: what comes out would be neither run."""
    out = shutil.copytree(interrupted.out, tmp_path / "run")
    edited = tmp_path / corpus.name
    edited.write_text(corpus.read_text().replace("argument", "parameter"))
    settings = out / "train.json"
    settings.write_text(settings.read_text().replace(str(corpus), str(edited)))
    assert main(["--resume", "--out", str(out)]) == 2
    assert "data:" in _said(capsys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--batch", "8"], "batch"),
        (["--seed", "1"], "seed"),
        (["--accumulate", "2"], "accumulate"),
        (["--optimizer.lr", "0.5"], "optimizer.lr"),
        (["--text.seq", "32"], "text.seq"),
        (["--model.layers", "3"], "model.layers"),
        (["other.txt"], "data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resuming_with_another_setting_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    """Else a run goes on as another one, and nobody sees it in the curve."""
    out = _saved(tmp_path / "run")
    assert main(["--resume", "--out", str(out), *change]) == 2
    said = _said(capsys)
    assert f"{named} can't change on --resume" in said


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _saved(tmp_path / "run")
    before = (out / "train.json").read_bytes()
    assert main([__file__, "--out", str(out), *SETTINGS]) == 2
    said = _said(capsys)
    assert "out:" in said and "--resume" in said
    assert (out / "train.json").read_bytes() == before and list(out.iterdir()) == [out / "train.json"]


def test_resuming_where_there_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert "out: there is no run to resume" in _said(capsys)


@pytest.mark.parametrize("content", ["", '{"data": ["a"', "[]", '{"data": [], "colour": "red"}'])
def test_settings_that_cannot_be_read_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    """A machine that went down while they were written, or another version: no stack trace."""
    (tmp_path / "train.json").write_text(content)
    assert main(["--resume", "--out", str(tmp_path)]) == 2
    assert "train.json" in _said(capsys)


def test_the_settings_of_a_run_come_back_as_they_were(tmp_path: Path, interrupted: Interrupted) -> None:
    """Else a resumed run is refused for a change that nobody made."""
    text = (interrupted.out / "train.json").read_text()
    saved = TrainConfig.from_json(text)
    assert json.loads(saved.to_json()) == json.loads(text)
    assert (saved.batch, saved.text.seq, saved.model.dim) == (4, 64, 32)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "steps"),
        (["--batch", "-1"], "batch"),
        (["--batch", "3", "--accumulate", "2"], "accumulate"),
        (["--accumulate", "0"], "accumulate"),
        (["--checkpoint-every", "0"], "checkpoint_every"),
        (["--keep", "0"], "keep"),
        (["--log-every", "0"], "log_every"),
        (["--eval-every", "-1"], "eval_every"),
        (["--eval-batches", "0"], "eval_batches"),
        (["--seed", "-1"], "seed"),
        (["--text.seq", "0"], "text.seq"),
        (["--text.seq", "65"], "text.seq"),
        (["--text.vocab-size", "10"], "vocab_size"),
        (["--text.heldout-fraction", "0"], "heldout_fraction"),
        (["--text.heldout-fraction", "nan"], "heldout_fraction"),
        (["--text.tokenizer", "missing.json"], "missing.json"),
        (["--optimizer.lr", "0"], "optimizer.lr"),
        (["--optimizer.lr", "nan"], "optimizer.lr"),
        (["--optimizer.lr", "inf"], "optimizer.lr"),
        (["--optimizer.clip", "0"], "optimizer.clip"),
        (["--optimizer.beta1", "1.5"], "optimizer.beta1"),
        (["--optimizer.warmup-steps", "-5"], "optimizer.warmup_steps"),
        (["--optimizer.decay-fraction", "0"], "optimizer.decay_fraction"),
        (["--model.heads", "3", "--model.kv-heads", "2"], "model.heads"),
        (["--model.head-dim", "15"], "model.head_dim"),
        (["--model.layers", "0"], "model.layers"),
        (["--model.vocab-size", "7"], "model.vocab_size"),
        (["--mesh", "dp=0"], "mesh"),
        (["--mesh", "pp=2"], "mesh"),
        (["--mesh", "dp=64", "--batch", "64"], "mesh"),
        (["--mesh", "tp=2"], "mesh"),
        (["--mesh", "dp=8"], "dp"),
        (["--preset", "900b"], "preset"),
        (
            ["--kernels", "cpu", "--mesh", "dp=2"],
            "kernels=cpu can't compute linear: it runs on one device, and there are 2",
        ),
        (["--kernels", "fast"], "kernels=fast"),
        (["/nowhere/at/all.txt"], "/nowhere/at/all.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_work_is_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    """And it is said before anything is computed, with exit status 2."""
    positional = arguments if arguments[0].startswith("/") else [str(corpus)]
    settings = [word for word in arguments if word not in positional]
    assert main([*positional, *SETTINGS, "--steps", "1", "--out", str(tmp_path / "out"), *settings]) == 2
    assert named in _said(capsys).replace(" / ", "/")
    assert not (tmp_path / "out" / "train.json").exists(), "what can't work must not look like a run"
