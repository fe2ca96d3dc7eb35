"""The command `isthmus convert`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.weights.checkpoint import CheckpointError
from isthmus.quality.convert import ConvertConfig, convert
from isthmus.quality.gate import QualityError

HELP = """Converts a model folder between Hugging Face's layout and ours.

Weights come out bit for bit as they went in, unless quantizing, --dtype or merging an adapter changes them.

examples:
  isthmus convert runs/mine exported               # a trained model, for transformers and whatever reads its layout
  isthmus convert runs/adapter merged              # a LoRA adapter, merged into its base model
  isthmus convert Llama-3.2-1B llama --to isthmus  # optional: serving and --init read it as it is
  isthmus convert runs/mine mine.gguf --gguf q8_0  # one file, for llama.cpp
  isthmus convert Llama-3.2-1B small --quantize int4 --text prose.txt  # quantized, and what that costs

TARGET must not exist. It appears once all of it is written."""


def main(argv: Sequence[str]) -> int:
    config = tyro.cli(ConvertConfig, args=list(argv), description=HELP, prog="isthmus convert")
    console = Console(soft_wrap=True)
    try:
        convert(config, console)
    except (ConfigError, CheckpointError, QualityError, OSError) as error:
        console.print(f"isthmus convert: {error}", style="red", markup=False)
        return 2
    return 0
