"""What a run needs to go on: its settings, which are in train.json, and which of them may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from isthmus.errors import ConfigError
from isthmus.model.process.files import replace_file
from isthmus.model.weights.checkpoint import FOLDER, Checkpoints
from isthmus.train.config import TrainConfig, check_resumable
from isthmus.train.optimizer import first_difference

FILE = "train.json"


def load_saved(folder: Path) -> TrainConfig:
    """The settings of the run in `folder`, without `download`, because it goes on from what it fetched. Raises
    ConfigError when they can't be read."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"out: there is no run to resume in {folder}")
    try:
        saved = TrainConfig.from_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"out: {path} can't be read as a run's settings: {error}") from None
    return dataclasses.replace(saved, download=False)


def save_settings(config: TrainConfig, folder: Path) -> None:
    """Writes train.json whole or not at all."""
    replace_file(folder / FILE, lambda part: part.write_text(config.to_json(), encoding="utf-8"))


def resolve_resume(config: TrainConfig) -> TrainConfig:
    """`config`, with the data of the run that it resumes if it names none. Raises ConfigError if the folder has a run
    and none is to be resumed, or the other way round, and for a setting that would make it another run."""
    if not config.resume:
        if (config.out / FILE).exists():
            raise ConfigError(f"out: {config.out} holds a run already; go on with --resume or name another --out")
        return config
    saved = load_saved(config.out)
    asked = config if config.data else dataclasses.replace(config, data=saved.data)
    check_resumable(saved, asked)
    if asked.steps != saved.steps:
        _check_steps(saved, config.out, asked.steps)
    return asked


def _check_steps(saved: TrainConfig, out: Path, steps: int) -> None:
    """Raises ConfigError unless a run of `steps` steps would have had the same learning rates until now."""
    done = _newest_step(out)
    change = f"steps can't change from {saved.steps} to {steps} on --resume"
    if steps < done:
        raise ConfigError(f"{change}: {done} are done")
    same = first_difference(saved.optimizer, saved.steps, steps, done)
    if same is None:
        return
    if saved.optimizer.schedule == "cosine":
        raise ConfigError(
            f"{change}: a cosine schedule's learning rates depend on the number of steps. Start a new run with another "
            "--out; one with --optimizer.schedule wsd can be lengthened until its rate decays"
        )
    raise ConfigError(
        f"{change}: the newest checkpoint is of step {done}, and the learning rates of both runs are the same up to "
        f"step {same} only. Start a new run with another --out"
    )


def _newest_step(out: Path) -> int:
    """The step of the newest checkpoint in `out`; 0 if there is none."""
    if not (out / FOLDER).is_dir():
        return 0
    checkpoints = Checkpoints(out)
    try:
        return checkpoints.latest() or 0
    finally:
        checkpoints.close()
