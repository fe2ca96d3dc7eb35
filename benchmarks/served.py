"""How far a model's predictions, as `isthmus serve` computes them, are from those of a file of llama.cpp's: the paged
cache, the kernels, the dtypes and the integers that serve, over the same tokens and with llama.cpp's definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from isthmus.benchmarks.perplexity import BaseLogits
from isthmus.errors import ConfigError
from isthmus.model.weights.folder import ModelFolder
from isthmus.model.weights.quantization import SCHEMES, weight_bytes
from isthmus.quality.divergence import Gathered, Quality
from isthmus.serve.engine.build import open_model
from isthmus.serve.engine.scoring import predictions


@dataclasses.dataclass(frozen=True)
class Served(Quality):
    """What a model lost, and what it takes."""

    bytes: int
    """Of weights, as serving keeps them"""


def measure(
    model: Path,
    quantize: str | Sequence[str],
    dtype: str,
    cache_dtype: str,
    base: Path,
    tick: Callable[[], None] = lambda: None,
) -> Served:
    """Runs the model of a folder over a base file's tokens; tick() after each window.

    quantize: a scheme of model/weights/quantization.py, or rules; "none" for a folder that is quantized already, or is
    to be measured in `dtype`. dtype and cache_dtype: as serving takes them. Raises ConfigError.
    """
    folder = _open(model, quantize, dtype)
    size = weight_bytes(folder.config, folder.quantize or folder.config.quantization)
    file = BaseLogits.open(base)
    if file.vocab != folder.config.vocab_size:
        raise ConfigError(f"base: {base} has a vocabulary of {file.vocab}, {model} of {folder.config.vocab_size}")
    if file.n_ctx > folder.config.context_length:
        raise ConfigError(f"base: {base} has windows of {file.n_ctx}, {model} takes {folder.config.context_length}")
    gathered = Gathered()
    for window, logits in enumerate(predictions(folder, cache_dtype, windows(folder, file), file.first)):
        gathered.add(file.log_probabilities(window), logits, file.targets(window))
        tick()
    return Served(**vars(gathered.quality()), bytes=size)


def _open(model: Path, quantize: str | Sequence[str], dtype: str) -> ModelFolder:
    if not isinstance(quantize, str):
        return dataclasses.replace(open_model(model, dtype), quantize=tuple(quantize))
    if quantize in SCHEMES:
        return open_model(model, dtype, quantize=quantize)
    return _open(model, quantize.split(","), dtype)


def windows(folder: ModelFolder, file: BaseLogits) -> np.ndarray:
    """int32[windows, n_ctx]: the file's tokens as llama.cpp gives them to the model: where the text began with a token
    that the tokenizer puts there, every window does."""
    tokens = file.tokens.copy()
    if folder.tokenizer.encode("")[:1] == [int(tokens[0, 0])]:
        tokens[:, 0] = tokens[0, 0]
    return tokens
