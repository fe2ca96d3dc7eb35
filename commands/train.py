"""The training command line, generated from TrainConfig."""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.config import PRESETS
from isthmus.model.execution import DEFAULT_EXECUTION, PRESET_EXECUTIONS
from isthmus.model.weights.hub import FolderOptions
from isthmus.train.config import DataConfig, TrainConfig
from isthmus.train.files import described

if TYPE_CHECKING:
    from isthmus.train.loop import Report


def preset_table() -> str:
    """A line for each preset: its parameters, layers, width and context."""
    lines = []
    for name, config in PRESETS.items():
        sized = dataclasses.replace(config, vocab_size=config.vocab_size or DataConfig().vocab_size)
        size = f"{sized.parameters / 1e6:,.1f}M"
        lines.append(
            f"  {name:<6}{size:>9}  {config.layers:>2} layers, width {config.dim:>4}, context {config.context_length}"
        )
    return "\n".join(lines)


HELP = f"""Trains a transformer on text and leaves a model folder that `isthmus serve` reads; or fine-tunes one.

examples:
  isthmus train notes/ book.txt --preset 5m --steps 2000 --out runs/mine
  isthmus train corpus.jsonl --preset 125m --mesh dp=2,fsdp=2,tp=2 --batch 64 --accumulate 4
  isthmus train --init models/Qwen3-0.6B chats.jsonl --steps 300 --out runs/full
  isthmus train --init models/Qwen3-0.6B chats.jsonl --steps 300 --model.lora.rank 8 --out runs/adapter
  isthmus train --resume --out runs/mine

Values of --preset, with their parameters at the default size of the vocabulary:
{preset_table()}

--init starts from a model folder, ours or as Hugging Face publishes it, with its tokenizer and chat template; the
learning rate then defaults to 2e-5. With --model.lora.rank, adapters alone are trained (2e-4), and --out becomes a PEFT
adapter folder. A .jsonl file holds a document in each line, a .json file one document or an array of them, each either
  {{"text": "all of it is learnt, and where it ends"}} or
  {{"messages": [{{"role": "user", "content": "2 + 2?"}}, {{"role": "assistant", "content": "4"}}]}}

Of messages, which the chat template writes as text, only what the assistant says is learnt. A document longer than
--text.seq is cut: each part is learnt without seeing the parts before it. All other files are text, in UTF-8 or UTF-16.
Any file may be gzipped. A folder is read whole but for what is hidden, linked, binary or a text above 64 MiB; what is
left out is printed.

Ctrl-C saves a checkpoint and ends; --resume goes on from it, bit for bit as if it had never stopped. With
--optimizer.schedule wsd, --resume --steps N can also lengthen a run whose learning rate doesn't decay yet."""


@dataclass(frozen=True)
class _Start:
    """The settings that decide the defaults of all others, named as in TrainConfig."""

    preset: str | None = None
    init: Path | None = None
    out: Path = TrainConfig.out
    resume: bool = False
    download: bool = False
    ignore_field: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    lora_rank: Annotated[int, tyro.conf.arg(name="model.lora.rank")] = 0

    def defaults(self) -> TrainConfig:
        """The configuration that all other flags change. Raises ConfigError."""
        if self.resume:
            from isthmus.train.resume import load_saved

            return load_saved(self.out)
        if self.init is not None:
            from isthmus.train.start import fine_tuning

            if self.preset is not None:
                raise ConfigError("preset can't be set with --init: the model in the folder decides the size")
            options = FolderOptions(ignore_field=self.ignore_field, download=self.download)
            return fine_tuning(self.init, adapters=self.lora_rank != 0, options=options)
        return TrainConfig() if self.preset is None else of_preset(self.preset)


def of_preset(name: str) -> TrainConfig:
    """The default configuration for training a preset. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
    model, execution = PRESETS[name], PRESET_EXECUTIONS.get(name, DEFAULT_EXECUTION)
    return TrainConfig(preset=name, model=model, execution=execution, text=DataConfig().fitted(model.context_length))


def parse(argv: Sequence[str]) -> TrainConfig:
    """Reads the command line. Raises ConfigError."""
    start, _ = tyro.cli(_Start, args=list(argv), return_unknown_args=True, add_help=False)
    config = tyro.cli(TrainConfig, args=list(argv), default=start.defaults(), description=HELP, prog="isthmus train")
    # tyro appends repeated flags to the default, and a resumed run's default holds them already.
    return dataclasses.replace(config, ignore_field=tuple(dict.fromkeys(config.ignore_field)))


@functools.cache
def _hush_failed_saves() -> None:
    """Keeps TensorStore and asyncio from printing a traceback for each other write that was under way when a write of a
    checkpoint fails. The failure itself is raised as a CheckpointError."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    inner = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            inner(unraisable)

    sys.unraisablehook = hook


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the process's exit status: 0 if the run is done, 1 if it or the machine failed, 2 if its configuration
    can't work, 128 + the signal's number if a signal ended it early."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be text in the terminal's encoding
    console = Console(soft_wrap=True, highlight=False, markup=False)

    def failed(error: object, status: int) -> int:
        try:
            console.print(f"isthmus train: {error}", style="red")
        except OSError:  # standard output is a file on the disk that is full, or a pipe that was closed
            print(f"isthmus train: {error}", file=sys.stderr)
        return status

    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        from isthmus.model.device.compilation import enable_compilation_cache
        from isthmus.train.loop import TrainError, train

        _hush_failed_saves()
        try:
            if warning := enable_compilation_cache():
                console.print(warning, style="yellow")
            report = train(config, console)
        except TrainError as error:
            return failed(error, 1)
    except ConfigError as error:
        return failed(error, 2)
    except OSError as error:
        return failed(described(error), 1)
    if report.interrupted:
        console.print(
            f"stopped at step {report.steps}, checkpoint saved; go on with: isthmus train --resume --out {config.out}"
        )
        return 128 + report.interrupted
    _say_done(report, config.out, console)
    return 0


def _say_done(report: Report, out: Path, console: Console) -> None:
    from isthmus.train.metrics import save_curve

    bits = "" if report.bits_per_byte is None else f", {report.bits_per_byte:.3f} bits per byte"
    speed = f"{report.tokens_per_second:,.0f} tok/s, MFU {report.mfu:.1%}, " if report.tokens_per_second else ""
    try:
        curve = f"   loss curve: {save_curve(out)}"
    except OSError as error:
        curve = f"   no loss curve ({error.strerror})"
    console.print(
        f"done: held-out loss {report.heldout_loss:.3f} nats per token{bits}; {speed}{report.seconds:.0f} s\n"
        f"model: {out}{curve}   serve it: isthmus serve --model {out}"
    )
