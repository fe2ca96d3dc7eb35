"""The training command line, generated from TrainConfig."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from model.config import PRESETS, ConfigError
from train.config import TrainConfig

HELP = """Trains a transformer on text and leaves a model folder that `isthmus serve` reads; or fine-tunes one.

examples:
  isthmus train notes/ book.txt --preset 5m --steps 2000 --out runs/mine
  isthmus train corpus.jsonl --preset 125m --mesh dp=2,fsdp=2,tp=2 --batch 64 --accumulate 4
  isthmus train --init models/Qwen3-0.6B chats.jsonl --steps 300 --out runs/full
  isthmus train --init models/Qwen3-0.6B chats.jsonl --steps 300 --model.lora.rank 8 --out runs/adapter
  isthmus train --resume --out runs/mine

--init starts from a model folder, ours or as Hugging Face publishes it, with its tokenizer and chat template; the
learning rate then defaults to 2e-5. With --model.lora.rank, adapters alone are trained (2e-4), and --out becomes a PEFT
adapter folder. A .jsonl file holds a document a line, either of
  {"text": "all of it is learnt, and where it ends"}
  {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
Of messages, written as the chat template writes them, what the assistant says is learnt. A document longer than
--text.seq is cut: what follows is learnt without seeing what came before.

Ctrl-C saves a checkpoint and ends; --resume goes on from it, bit for bit as if it had never stopped."""


def parse(argv: Sequence[str]) -> TrainConfig:
    """Reads the command line. --preset, --init and --resume decide what the other settings default to. Raises
    ConfigError."""
    default = TrainConfig()
    if "--resume" in argv:
        from train.loop import load_saved

        out = Path(_value(argv, "--out") or default.out)
        if not (out / "train.json").is_file():
            raise ConfigError(f"out: there is no run to resume in {out}")
        default = load_saved(out)
    elif (init := _value(argv, "--init")) not in (None, "None"):
        from train.start import fine_tuning

        if _value(argv, "--preset") is not None:
            raise ConfigError("preset can't be set with --init: the model in the folder has its size")
        rank = _value(argv, "--model.lora.rank")
        default = fine_tuning(Path(str(init)), adapters=rank not in (None, "0"))
    elif (name := _value(argv, "--preset")) is not None:
        if name not in PRESETS:
            raise ConfigError(f"preset: {name!r} is none of {', '.join(PRESETS)}")
        default = TrainConfig(preset=name, model=PRESETS[name])
    return tyro.cli(TrainConfig, args=list(argv), default=default, description=HELP, prog="isthmus train")


def _value(argv: Sequence[str], flag: str) -> str | None:
    for index, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the process's exit status."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        from model.checkpoint import CheckpointError
        from model.compilation import enable_compilation_cache
        from train.loop import TrainError, train
        from train.metrics import save_curve

        if warning := enable_compilation_cache():
            console.print(warning, style="yellow", markup=False)
        try:
            report = train(config, console)
        except (TrainError, CheckpointError) as error:
            console.print(f"isthmus train: {error}", style="red", markup=False)
            return 1
    except ConfigError as error:
        console.print(f"isthmus train: {error}", style="red", markup=False)
        return 2
    if report.interrupted:
        console.print(
            f"stopped at step {report.steps}, checkpoint saved; go on with: isthmus train --resume --out {config.out}"
        )
        return 0
    bits = "" if report.bits_per_byte is None else f", {report.bits_per_byte:.3f} bits a byte"
    console.print(
        f"done: held-out loss {report.heldout_loss:.3f} nats a token{bits}; "
        f"{report.tokens_per_second:,.0f} tok/s, MFU {report.mfu:.1%}, {report.seconds:.0f} s\n"
        f"model: {config.out}   loss curve: {save_curve(config.out)}   serve it: isthmus serve --model {config.out}"
    )
    return 0
