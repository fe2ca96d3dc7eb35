"""Models with random weights: the speed of a step doesn't depend on what was learnt."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import jax

from isthmus.errors import ConfigError
from isthmus.model.config import PRESETS, ModelConfig
from isthmus.model.sharding import MeshShape, build_mesh, use_mesh
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.model.weights.random import init_params

DEFAULT_VOCAB = 32000
"""Vocabulary of presets that leave it to the tokenizer"""

SAMPLE_BYTES = 8 << 20
"""How much of Python's own source a tokenizer is trained on"""


def preset(name: str, vocab_size: int) -> ModelConfig:
    """A preset with a vocabulary of `vocab_size`; 0 is the preset's own, or DEFAULT_VOCAB. Raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"preset: {name!r} is none of {', '.join(PRESETS)}")
    config = PRESETS[name]
    return dataclasses.replace(config, vocab_size=vocab_size or config.vocab_size or DEFAULT_VOCAB)


def write_model(folder: Path, config: ModelConfig) -> None:
    """A model folder as `isthmus train` leaves it, with random weights and a byte-level BPE of Python's own source."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.train(python_source(SAMPLE_BYTES), config.vocab_size)
    tokenizer.save(folder / "tokenizer.json")
    _pad_vocabulary(folder / "tokenizer.json", config.vocab_size)
    config.save(folder / "config.json")
    mesh = build_mesh(MeshShape())
    checkpoints = Checkpoints(folder)
    with use_mesh(mesh):
        checkpoints.save(0, init_params(config, 0, mesh, stacked=True), {"steps": jax.numpy.int32(0)}, {"step": 0})
    checkpoints.close()


def _pad_vocabulary(path: Path, size: int) -> None:
    """Adds tokens that occur in no text until there are `size`, so that every row of the head can be drawn."""
    fields = json.loads(path.read_text())
    vocab = fields["model"]["vocab"]
    taken = len(vocab)
    vocab.update({f"<|unused{index}|>": index for index in range(taken, size)})
    path.write_text(json.dumps(fields, ensure_ascii=False))


def python_source(limit: int) -> Iterator[str]:
    """The standard library's modules, in order, up to `limit` bytes: text that every machine has."""
    left = limit
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if "site-packages" in path.parts or left <= 0:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        left -= len(text)
        yield text
