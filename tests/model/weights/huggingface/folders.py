"""Small published folders for the tests of reading and writing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.huggingface.coded.files import open_tensors
from isthmus.model.weights.huggingface.families import read_config
from isthmus.model.weights.huggingface.files import INDEX, SINGLE
from isthmus.model.weights.huggingface.load import PublishedSource
from isthmus.model.weights.load import load_params
from tests.parity.families import GOLDEN
from tests.parity.weights import family_tensors


def write_tokenizer(folder: Path, size: int = 90) -> None:
    """A byte-level tokenizer of the first letters; id 0 ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    vocabulary = {"<|endoftext|>": 0, **{letter: index for index, letter in enumerate(letters, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_folder(folder: Path, family: str, *, dtype: Any = np.float32, shards: int = 1, **fields: Any) -> Path:
    """A folder as it is published; fields: changes to config.json, None removing one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((GOLDEN / family / "config.json").read_text())
    config = {name: value for name, value in {**config, **fields}.items() if name not in fields or value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    tensors = {name: array.astype(dtype) for name, array in family_tensors(GOLDEN / family).items()}
    write_tensors(folder, tensors, shards)
    return folder


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return
    names = sorted(tensors)
    placed = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in names if placed[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def loaded(folder: Path, mesh: Mesh, dtype: str | None = None, *, stacked: bool = False) -> Params:
    """The folder's parameters, whether it has a tokenizer or not."""
    family, config = read_config(folder / "config.json")
    source = PublishedSource(open_tensors(folder, family.method), family, config, mesh)
    return load_params(source, abstract_params(config, mesh, stacked=stacked, dtype=dtype))
