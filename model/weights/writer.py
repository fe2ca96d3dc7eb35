"""Writes model folders, in our own format and as Hugging Face publishes them, and GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.process.files import present, read_json, write_json
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer
from isthmus.model.transformer import Params
from isthmus.model.weights.checkpoint import QUANTIZATION, Checkpoints
from isthmus.model.weights.companions import PUBLISHED_CONFIG, copy_companions
from isthmus.model.weights.described import Described
from isthmus.model.weights.gguf.export import architecture_name, write_model
from isthmus.model.weights.huggingface.coded.method import FIELD as CODED
from isthmus.model.weights.huggingface.export import (
    DTYPES_FILE,
    published_config,
    stored_dtypes,
    weight_bytes,
    write_weights,
)
from isthmus.model.weights.huggingface.families import Family, read_config, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.load import OnProgress

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def describe(target: Path, config: ModelConfig | None, source: Described | None) -> None:
    """Writes to a folder of ours what serving and exporting need besides its weights.

    config: the model's configuration; None for an adapter's folder, which has none. source: the model that this one was
    made from. Its tokenizer, chat template and terms of use are copied.
    """
    if source is not None:
        copy_companions(source.path, target)
        if source.adapter is not None:  # the adapter's files replace those of its base model, as in serving
            copy_companions(source.adapter, target)
    if config is None:
        return
    if source is not None:
        _keep_published_config(source, target)
    config.save(target / "config.json")


def write_folder(target: Path, folder: Described, params: Params) -> None:
    """Writes a folder of ours to `target`, which is an empty folder. params: the parameters of folder.config, in either
    layout; its quantization says how the integers among them were made."""
    progress = {"step": 0, "tokens": 0, QUANTIZATION: list(folder.config.quantization)}
    checkpoints = Checkpoints(target)
    checkpoints.save(0, params, None, progress)
    checkpoints.close()
    describe(target, folder.config, folder)
    if folder.weights is not None:
        write_json(target / DTYPES_FILE, stored_dtypes(folder.weights))
    elif (folder.path / DTYPES_FILE).is_file():  # from the published model that ours was made from
        shutil.copyfile(folder.path / DTYPES_FILE, target / DTYPES_FILE)


def _keep_published_config(source: Described, target: Path) -> None:
    """Keeps the config.json that a model was published with, without its quantization_config, because our weights are
    not stored that way."""
    if source.family is None:
        if (source.path / PUBLISHED_CONFIG).is_file():
            shutil.copyfile(source.path / PUBLISHED_CONFIG, target / PUBLISHED_CONFIG)
        return
    values = read_json(source.path / "config.json")
    if CODED in values:
        del values[CODED]
        write_json(target / PUBLISHED_CONFIG, values)
    else:
        shutil.copyfile(source.path / "config.json", target / PUBLISHED_CONFIG)


class PublishedFolder:
    """Writes a model as a folder in Hugging Face's format."""

    def __init__(self, folder: Described, dtype: str) -> None:
        """dtype: the dtype of all tensors. With "source", each keeps the dtype that it was published in, or float32
        where none is known. Raises ConfigError when no family computes this network."""
        self._folder = folder
        self._family, self._values = _published(folder)
        self._dtypes = _stored_as(folder) if dtype == "source" else {"": _DTYPES[dtype]}

    @property
    def nbytes(self) -> int:
        """The size in bytes of the weights that will be written."""
        return weight_bytes(self._folder.config, self._family, self._dtypes)

    def write(self, target: Path, params: Params, max_shard_bytes: int, on_progress: OnProgress) -> None:
        """Writes to `target`, which is an empty folder. params: in the unstacked layout, without adapters."""
        folder = self._folder
        write_weights(target, self._family, folder.config, params, self._dtypes, max_shard_bytes, on_progress)
        kept = {name: value for name, value in self._values.items() if name not in ("torch_dtype", CODED)}
        names = {stored: dtype for dtype, stored in _DTYPES.items()}
        describe(target, None, folder)
        if folder.family is None and not (folder.path / PUBLISHED_CONFIG).is_file():
            _describe_tokenizer(folder.tokenizer, target)
        write_json(target / "config.json", {**kept, "dtype": names[self._dtypes[""]]})


def check_gguf(folder: Described) -> None:
    """Raises ConfigError for a network that can't be written as GGUF."""
    architecture_name(_published(folder)[1]["model_type"])


def write_gguf(target: Path, folder: Described, params: Params, kind: str, on_progress: OnProgress) -> None:
    """Writes a GGUF file. params: in the unstacked layout, without adapters. kind: one of gguf.export.KINDS, which
    matrices are stored as."""
    family, values = _published(folder)
    write_model(target, folder, values["model_type"], family, params, kind, on_progress)


def _published(folder: Described) -> tuple[Family, dict[str, Any]]:
    """Returns the family and the config.json to write. Raises ConfigError when no family computes the network."""
    kept = folder.path / ("config.json" if folder.family is not None else PUBLISHED_CONFIG)
    if not kept.is_file():
        values = published_config(folder.config)
        return read_fields(Fields(values, kept))[0], values
    family, read = read_config(kept, folder.ignore_field)
    if not read.computes_as(folder.config):
        raise ConfigError(f"{kept} describes another network than {folder.path / 'config.json'}")
    return family, read_json(kept)


def _stored_as(folder: Described) -> dict[str, str]:
    """The dtype that each tensor was published in, in the form that `stored_dtypes` returns."""
    if folder.weights is not None:
        return stored_dtypes(folder.weights)
    kept = folder.path / DTYPES_FILE
    return read_json(kept) if present(kept) else {"": "F32"}


def _describe_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
    """Writes the files that transformers needs to open a tokenizer that was trained here."""
    assert tokenizer.eos_id is not None, "training always makes one"
    token = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    write_json(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **token})
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    write_json(target / "generation_config.json", ends)
