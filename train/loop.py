"""A training run: data → step → loop, with checkpoints, metrics, progress, and an orderly end when interrupted."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError

from isthmus.errors import ConfigError
from isthmus.model.device.hardware import check_dtype
from isthmus.model.process.progress import working
from isthmus.model.sharding import build_mesh, check_divisible
from isthmus.model.transformer import runs
from isthmus.model.weights.checkpoint import CheckpointError, Checkpoints
from isthmus.model.weights.folder import ModelFolder
from isthmus.model.weights.huggingface.adapters import save_adapter
from isthmus.model.weights.layout import stack_params
from isthmus.model.weights.writer import describe
from isthmus.train.config import TrainConfig
from isthmus.train.data import TrainingData, prepare
from isthmus.train.files import Reading, described
from isthmus.train.metrics import MetricsLog, read_metrics
from isthmus.train.optimizer import LearningRates, build_optimizer
from isthmus.train.resume import FILE, load_saved, resolve_resume, save_settings
from isthmus.train.speed import Speed, step_flops
from isthmus.train.start import load_start, open_start, with_kernels
from isthmus.train.step import Metrics, Trainer, TrainState

RUN_AHEAD = 2
"""How many steps are launched before the loss of the oldest one is read"""


class TrainError(RuntimeError):
    """The run can't go on; the message says why and what to do."""


@dataclass(frozen=True)
class Report:
    """How a run ended."""

    steps: int
    interrupted: int
    """Number of the signal that ended the run early; 0 means none"""
    loss: float
    """Mean nats per target over the last `log_every` steps"""
    heldout_loss: float | None
    """Mean nats per target of the held-out text; None if the run was interrupted"""
    bits_per_byte: float | None
    """Bits per byte of the held-out text; None if it has conversations, of which not everything counts"""
    tokens_per_second: float
    mfu: float
    """Share of the machine's peak FLOP/s that the steps reached"""
    seconds: float
    """Wall time since the data were prepared"""


def train(config: TrainConfig, console: Console | None = None) -> Report:
    """Trains as configured and returns how the run ended. Raises ConfigError for settings that can't work, and
    TrainError when the loss isn't finite or the disk fails; both say what to do."""
    console = console or Console()
    try:
        return _train(config, console)
    except (CheckpointError, OSError) as error:
        raise TrainError(f"{described(error, config.out)}{_go_on(config.out)}") from error


def _go_on(out: Path) -> str:
    return f"; once that is mended: isthmus train --resume --out {out}" if os.path.isfile(out / FILE) else ""


def _train(config: TrainConfig, console: Console) -> Report:
    config = resolve_resume(config)
    config.validate()
    check_dtype(config.execution.dtype)
    config = with_kernels(config, build_mesh(config.mesh_shape))
    folder = open_start(config)
    for warning in folder.remarks if folder else ():
        console.print(warning, style="yellow", markup=False)
    if folder is not None:  # the folder in the cache that a name stands for now: a newer version is another model
        config = dataclasses.replace(config, init=folder.source)
    if not config.resume:
        config = _fit_warmup(config, console)
    config.out.mkdir(parents=True, exist_ok=True)
    data, config = _prepare_data(config, folder, console)
    return _Run(config, folder, data, console).run()


def _fit_warmup(config: TrainConfig, console: Console) -> TrainConfig:
    optimizer = config.optimizer.fitted(config.steps)
    if optimizer != config.optimizer:
        console.print(
            f"warm-up: optimizer.warmup_steps={config.optimizer.warmup_steps} leaves nothing of steps={config.steps}: "
            f"{optimizer.warmup_steps} instead"
        )
    return dataclasses.replace(config, optimizer=optimizer)


def _prepare_data(
    config: TrainConfig, folder: ModelFolder | None, console: Console
) -> tuple[TrainingData, TrainConfig]:
    """Tokenizes the text, decides the vocabulary's size, and saves the settings that the run has from now on."""
    start, reading = time.perf_counter(), Reading()
    with working(console, "reading text") as show:
        seen: collections.Counter[str] = collections.Counter()

        def on_progress(stage: str, size: int) -> None:
            seen[stage] += size
            show(f"{stage}: {seen[stage] / 1e6:.0f} MB of text")

        data, tokenizer = prepare(
            config.data,
            config.text,
            config.out,
            config.seed,
            on_progress,
            resume=config.resume,
            start=folder,
            reading=reading,
        )
    console.print(f"data: {reading}", markup=False, highlight=False)
    if folder is None:
        config = _with_vocabulary(config, tokenizer.vocab_size)
    check_divisible(config.model, config.mesh_shape)
    _write_settings(config, folder)
    total, targets = len(data.train.tokens), data.train.targets
    of_them = "" if data.train.weights is None else f", {targets:,} of them ({targets / total:.0%}) to learn"
    console.print(
        f"text: {data.train.text_bytes / 1e6:.1f} MB, {total:,} tokens to train on{of_them}; {_heldout(data)}; "
        f"vocabulary {tokenizer.vocab_size} ({time.perf_counter() - start:.1f} s)"
    )
    return data, config


def _heldout(data: TrainingData) -> str:
    """Says what is held out, such as: held out: 3 documents and the ends of 12 more, 250 kB (2.0%)"""
    held = data.heldout
    whole = len(held.ends) - held.tails
    parts = [f"{whole} document{'s'[: whole != 1]}"] if whole else []
    if held.tails:
        parts.append(f"the end{'s'[: held.tails != 1]} of {held.tails}{' more' if whole else ''}")
    share = held.text_bytes / (held.text_bytes + data.train.text_bytes)
    return f"held out: {' and '.join(parts)}, {held.text_bytes / 1e3:.0f} kB ({share:.1%})"


def _with_vocabulary(config: TrainConfig, size: int) -> TrainConfig:
    """`config` with a vocabulary that has room for the tokenizer's `size` ids."""
    if config.model.vocab_size in (0, size):
        # A multiple of 128 splits over any mesh and fills the matrix units; the extra ids never occur in the data.
        vocab = -(-size // 128) * 128
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab))
    if config.model.vocab_size < size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {size}")
    return config


def _write_settings(config: TrainConfig, folder: ModelFolder | None) -> None:
    """Writes the folder's description and then train.json, which makes the folder a run. When a run is resumed, only
    its number of steps can be new."""
    if config.resume:
        saved = load_saved(config.out)
        if saved.steps != config.steps:
            save_settings(dataclasses.replace(saved, steps=config.steps), config.out)
        return
    describe(config.out, None if config.model.lora.rank else config.model, folder)
    save_settings(config, config.out)


class _Run:
    """One call of train(), and what its parts share."""

    def __init__(self, config: TrainConfig, folder: ModelFolder | None, data: TrainingData, console: Console) -> None:
        self.config, self.folder, self.data, self.console = config, folder, data, console
        self.mesh = build_mesh(config.mesh_shape)
        optimizer = build_optimizer(config.optimizer, config.steps, config.model)
        rate = config.optimizer.correction_rate
        self.trainer = Trainer(config.model, optimizer, self.mesh, config.execution, rate)
        self.learning_rate = LearningRates(config.optimizer, config.steps)
        self.checkpoints = Checkpoints(config.out, keep=config.keep)
        flops = step_flops(config.model, config.batch, config.text.seq)
        self.speed = Speed(config.batch * config.text.seq, flops, config.execution.dtype, self.mesh.size)
        self.pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self.losses: list[float] = []
        self.started = time.perf_counter()
        self.stop_signal = 0
        """Number of the signal that asked the run to end; 0 means none"""
        self._under_way = "this step; a second signal stops at once, without a checkpoint"
        """What a signal lets end, and what a second one does"""

    def run(self) -> Report:
        state, first = self._start()
        self.log = MetricsLog(self.config.out, first, self._warn)
        self.console.print(
            f"model: {self._parameters(state)}, {self.config.model.layers} layers; "
            f"{self.mesh.devices.flat[0].platform} {dict(self.mesh.shape)}; peak {self.speed.peak / 1e12:.2f} TFLOP/s "
            f"({self.speed.source})"
        )
        try:
            with self._interruptible():
                with self._progress(first) as progress:
                    state, done = self._loop(state, first, progress)
                self._drain()
                if self.checkpoints.latest() != done:  # before the evaluation, which may take minutes
                    self._save(state, done)
                else:
                    self._save_adapter(state)
                self._under_way = "this batch of held-out text; a second signal stops at once"
                heldout = (None, None) if done < self.config.steps else self._final_heldout(state, first, done)
            interrupted = self.stop_signal if heldout[0] is None else 0
        finally:
            try:
                self.checkpoints.close()
            finally:
                self.log.close()
        return self._report(done, interrupted, heldout)

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def _start(self) -> tuple[TrainState, int]:
        config = self.config
        if self.folder and config.model.lora.rank:
            self.trainer.base = load_start(self.folder, config, self.mesh, self.console)
        if not config.resume or self.checkpoints.latest() is None:
            if config.resume:
                self.console.print("no checkpoint was finished before the run ended: starting from step 0")
            return self._first_state(), 0
        abstract = self.trainer.abstract_state(stacked=True)
        restored = self.checkpoints.restore(abstract.params, abstract.optimizer)
        state = self.trainer.reshard(TrainState(restored.params, restored.optimizer))
        self.console.print(f"resumed at step {restored.step}")
        return state, restored.step

    def _first_state(self) -> TrainState:
        config = self.config
        if self.folder is None or config.model.lora.rank:
            return self.trainer.init(config.seed)
        return self.trainer.state_from_params(load_start(self.folder, config, self.mesh, self.console))

    def _parameters(self, state: TrainState) -> str:
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        fixed = sum(leaf.size for leaf in jax.tree.leaves(self.trainer.base))
        if not fixed:
            return f"{trained / 1e6:.1f}M parameters"
        return f"{trained:,} of {(trained + fixed) / 1e6:.1f}M parameters trained ({trained / (trained + fixed):.2%})"

    def _loop(self, state: TrainState, first: int, progress: Any) -> tuple[TrainState, int]:
        config = self.config
        for step in range(first, config.steps):
            batch = self.data.batch(step, config.batch, config.accumulate)
            state, metrics = self.trainer.step(state, batch)
            self.pending.append((step + 1, metrics))
            self.checkpoints.check()
            if len(self.pending) > RUN_AHEAD:
                self._record(*self.pending.popleft())
            done = step + 1
            if step == first:  # the first step compiles; it is not part of the speed
                self._drain()
                self.speed.start(done)
            progress(done)
            if self.stop_signal:
                return state, done
            if done < config.steps:
                if config.eval_every and done % config.eval_every == 0:
                    self._pause(lambda s=state, d=done: self._evaluate(s, d, whole=False))
                if done % config.checkpoint_every == 0:
                    self._pause(lambda s=state, d=done: self._save(s, d))
        return state, config.steps

    def _record(self, step: int, metrics: Metrics) -> None:
        loss = float(metrics.loss)
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is {loss} at step {step}; start anew with a lower --optimizer.lr "
                f"or a longer --optimizer.warmup-steps"
            )
        self.losses.append(loss)
        self.speed.done(step)
        values = {"loss": loss, "grad_norm": float(metrics.grad_norm), "lr": self.learning_rate(step - 1)}
        if self.config.model.mixture.experts:
            values["expert_load"] = float(metrics.expert_load)
        if step % self.config.log_every == 0:
            values |= self.speed.window()
        self.log.write(step, **values)

    def _drain(self) -> None:
        while self.pending:
            self._record(*self.pending.popleft())

    def _pause(self, work: Any) -> None:
        """Runs `work` outside the measured time."""
        self._drain()
        start = time.perf_counter()
        work()
        self.speed.measure_again()
        self.speed.pause(time.perf_counter() - start)

    def _evaluate(self, state: TrainState, step: int, *, whole: bool) -> tuple[float | None, float | None]:
        """Held-out loss in nats per target, and bits per byte, or None if the text has conversations; None for both if
        it is told to stop. whole: whether to read all held-out text, or only `eval_batches` batches of it."""
        nats, targets, split = [], 0, self.data.heldout
        for index, batch in enumerate(self.data.heldout_batches(self.config.batch // self.config.accumulate)):
            if not whole and index >= self.config.eval_batches:
                break
            if whole and self.stop_signal:
                return None, None
            nats.append(self.trainer.evaluate(state.params, batch))
            targets += int(batch.weights.sum())
        total = float(np.sum([float(n) for n in nats]))
        if not targets:  # the first batches may hold no answers
            return math.nan, None
        bytes_read = split.text_bytes * targets / max(1, split.targets)
        values = {"heldout_loss": total / targets}
        if not split.conversations:
            values["bits_per_byte"] = total / math.log(2) / max(bytes_read, 1)
        self.log.write(step, **values)
        return values["heldout_loss"], values.get("bits_per_byte")

    def _final_heldout(self, state: TrainState, first: int, done: int) -> tuple[float | None, float | None]:
        """What _evaluate returns for all held-out text, or what the metrics hold if the run was complete when
        resumed."""
        rows = [row for row in read_metrics(self.config.out) if row["step"] == done == first and "heldout_loss" in row]
        if rows:
            return rows[-1]["heldout_loss"], rows[-1].get("bits_per_byte")
        return self._evaluate(state, done, whole=True)

    def _save(self, state: TrainState, step: int) -> None:
        progress = {"step": step, "tokens": step * self.config.batch * self.config.text.seq}
        with self.mesh:
            if self.config.model.lora.rank:
                state = stack_params(state, runs(self.config.model))
            self.checkpoints.save(step, state.params, state.optimizer, progress)
        self._save_adapter(state)

    def _save_adapter(self, state: TrainState) -> None:
        """Writes the adapters, if they are trained, beside the checkpoint, in the form that serving and PEFT read."""
        if self.folder and self.config.model.lora.rank:
            try:
                save_adapter(self.config.out, self.folder, self.config.model, state.params)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"the adapter can't be written in {self.config.out}: {error}") from None

    def _report(self, done: int, interrupted: int, heldout: tuple[float | None, float | None]) -> Report:
        self.speed.window()
        return Report(
            done,
            interrupted,
            self._loss(),
            *heldout,
            *self.speed.mean,
            seconds=time.perf_counter() - self.started,
        )

    def _loss(self) -> float:
        """Mean training loss over the last `log_every` steps; NaN before the first."""
        return float(np.mean(self.losses[-self.config.log_every :])) if self.losses else math.nan

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Inside this context, the first Ctrl-C or SIGTERM ends the run after the current step, or after a batch of the
        last evaluation, with a checkpoint, and the second one ends it at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.console.print(f"stopping after {self._under_way}")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _progress(self, first: int) -> Iterator[Any]:
        """Yields a function that shows the step: in a progress bar on a terminal, elsewhere in a line from time to
        time."""
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(
            *columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task("compiling", total=self.config.steps, completed=first)
            every = max(1, -(-self.config.steps // 20))

            def show(done: int) -> None:
                text = f"loss {self._loss():.3f} | {self.speed}"
                bar.update(task, completed=done, description=text)
                if not self.console.is_terminal and (done % every == 0 or done in (first + 1, self.config.steps)):
                    left = self.speed.left(self.config.steps - done)
                    self.console.print(f"step {done}/{self.config.steps} | {text}{left}", highlight=False)

            yield show
