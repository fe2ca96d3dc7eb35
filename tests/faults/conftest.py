"""Small training runs and servers in processes of their own, and what is left of them."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from isthmus.model.config import ModelConfig
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.text.tokenizer import END_OF_TEXT
from isthmus.model.transformer import abstract_params
from isthmus.model.weights.checkpoint import Checkpoints, CheckpointSource
from isthmus.model.weights.load import load_params
from isthmus.train.metrics import read_metrics
from tests.faults.storms import StartServing
from tests.serve.api.harness import CHAT_TEMPLATE, ServeProcess, save_model, train_tokenizer, varied_params

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 240.0
"""Seconds that a run may take before a test calls it stuck."""

STEPS = 90
CHECKPOINT_EVERY = 8
NETWORK = {
    "dim": 32,
    "layers": 2,
    "heads": 2,
    "kv-heads": 1,
    "head-dim": 16,
    "mlp-dim": 64,
    "context-length": 64,
}
SETTINGS = (
    *(word for name, size in NETWORK.items() for word in (f"--model.{name}", str(size))),
    *("--text.seq", "64", "--text.vocab-size", "300", "--batch", "4", "--steps", str(STEPS)),
    *(
        "--checkpoint-every",
        str(CHECKPOINT_EVERY),
        "--eval-every",
        "30",
        "--eval-batches",
        "2",
        "--log-every",
        "5",
    ),
    *("--optimizer.warmup-steps", "5", "--mesh", "dp=1"),
)


@dataclass(frozen=True)
class TrainProcess:
    """`isthmus train`."""

    out: Path
    process: subprocess.Popen[str]

    def last_step(self) -> int:
        return max((row["step"] for row in read_metrics(self.out)), default=0)

    def wait_for_step(self, step: int) -> None:
        """Until the loss of `step` is on disk."""
        deadline = time.monotonic() + PATIENCE
        while self.last_step() < step:
            assert self.process.poll() is None, f"it ended before step {step}: {self.output()}"
            assert time.monotonic() < deadline, f"step {step} never came"
            time.sleep(0.001)

    def output(self) -> str:
        """What it printed, on one line, once it has ended."""
        printed, _ = self.process.communicate(timeout=PATIENCE)
        return " ".join(printed.split())

    def finish(self, status: int = 0) -> str:
        """As output, of a run that must end with this exit status."""
        printed = self.output()
        assert self.process.returncode == status, printed
        return printed


StartTraining = Callable[..., TrainProcess]
SharedFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no message is broken in the middle of a word."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> SharedFolder:
    """shared_folder(name, fill) -> a folder that `fill` has filled once for all test processes; read it only."""
    base = tmp_path_factory.getbasetemp()
    base = (base if worker_id == "master" else base.parent) / "faults"
    base.mkdir(exist_ok=True)

    def shared(name: str, fill: Callable[[Path], object] = lambda folder: None) -> Path:
        folder = base / name
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished = base / f"{name}.{worker_id}"
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return shared


@pytest.fixture(scope="session")
def corpus(shared_folder: SharedFolder) -> Path:
    """One document, whose end is held out."""
    text = Path(argparse.__file__).read_text()
    return shared_folder("text", lambda folder: (folder / "corpus.txt").write_text(text)) / "corpus.txt"


@pytest.fixture(scope="session")
def start_training(shared_folder: SharedFolder) -> StartTraining:
    """start_training(out, *arguments) -> TrainProcess; programs are compiled once for all of them."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(shared_folder("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(out: Path, *arguments: str) -> TrainProcess:
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus", "train", *arguments, "--out", str(out)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **cache},
        )
        return TrainProcess(out, process)

    return start


@pytest.fixture(scope="session")
def reference(shared_folder: SharedFolder, start_training: StartTraining, corpus: Path) -> Path:
    """The folder of a run that nobody disturbed."""

    def run(out: Path) -> None:
        assert "done: held-out loss" in start_training(out, str(corpus), *SETTINGS).finish()

    return shared_folder("undisturbed", run)


@dataclass(frozen=True)
class Interrupted:
    out: Path
    printed: str
    """On one line"""


@pytest.fixture(scope="session")
def interrupted(shared_folder: SharedFolder, start_training: StartTraining, corpus: Path) -> Interrupted:
    """A run that was asked to stop, by Ctrl-C, in its middle."""

    def run(out: Path) -> None:
        training = start_training(out, str(corpus), *SETTINGS)
        training.wait_for_step(STEPS // 3)
        training.process.send_signal(signal.SIGINT)
        (out / "printed.txt").write_text(training.finish(130))  # `isthmus train … && …` doesn't take it for done

    out = shared_folder("interrupted", run)
    return Interrupted(out, (out / "printed.txt").read_text())


def parameters_hash(out: Path) -> str:
    """SHA-256 over every parameter of the newest checkpoint."""
    config, mesh = ModelConfig.load(out / "config.json"), build_mesh(MeshShape())
    params = load_params(CheckpointSource(out, config, mesh), abstract_params(config, mesh))
    digest = hashlib.sha256()
    for path, array in sorted(params.items()):
        digest.update(path.encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def newest_checkpoint(out: Path) -> int | None:
    checkpoints = Checkpoints(out)
    try:
        return checkpoints.latest()
    finally:
        checkpoints.close()


def losses(out: Path) -> list[tuple[int, str, float]]:
    """Every loss that the run wrote down, in its order: (step, kind, nats)."""
    kinds = ("loss", "heldout_loss")
    return [(row["step"], kind, row[kind]) for row in read_metrics(out) for kind in kinds if kind in row]


def _save_chat_model(folder: Path) -> None:
    model = save_model(folder / "model", train_tokenizer(), varied_params())
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": END_OF_TEXT}}))


@pytest.fixture
def serve(shared_folder: SharedFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartServing]:
    """serve(*arguments) starts `isthmus serve` of a tiny model that chats, on one device, as a user's machine has."""
    build_mesh(MeshShape())  # this process has its eight devices then, also if this is its first test
    monkeypatch.delenv("XLA_FLAGS")
    model = shared_folder("served", _save_chat_model) / "model"
    common = ["--model", str(model), "--port", "0", "--compilation-cache", str(shared_folder("served-programs"))]
    sizes = ["--engine.max-sequences", "8", "--engine.prefill-tokens", "64"]
    started: list[ServeProcess] = []

    def start(*arguments: str) -> ServeProcess:
        started.append(ServeProcess(*common, *sizes, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.kill()
