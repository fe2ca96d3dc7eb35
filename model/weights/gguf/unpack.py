"""Opens a GGUF file as the folder that it would be on Hugging Face. The small files of that folder are written out; the
tensors are read from the GGUF file itself."""

from __future__ import annotations

import atexit
import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.process.cleaning import remove
from isthmus.model.process.signals import cleanups
from isthmus.model.text.chat import TEMPLATE_FILE, TOKENIZER_CONFIG
from isthmus.model.weights.gguf.architectures import architecture_of, config_of
from isthmus.model.weights.gguf.files import GgufFiles, read_headers
from isthmus.model.weights.gguf.metadata import Metadata
from isthmus.model.weights.gguf.tokenizer import special_token, tokenizer_of

_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""The fields of generation_config.json, and the names of these settings in general.sampling."""
_ENDS = ("eos", "eot", "eom")
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class Unpacked:
    """A GGUF file that was opened as a folder."""

    folder: Path
    """A temporary folder with config.json, tokenizer.json and what else the metadata says, which is deleted when the
    process ends"""
    files: GgufFiles


def unpack(path: Path, ignore: Collection[str] = ()) -> Unpacked:
    """Opens a GGUF file. ignore: keys of the metadata that are read as if they were absent. Raises ConfigError for a
    file that is damaged, or that has settings which are not supported."""
    header = read_headers(path)
    metadata = Metadata(header.metadata, header.path, ignore)
    config = config_of(metadata, header)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    files = GgufFiles(header, architecture_of(metadata), heads, kv_heads)
    tokenizer = tokenizer_of(metadata)
    names = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    ends = [special_token(metadata, name, len(names)) for name in _ENDS]
    special = {ours: special_token(metadata, name, len(names)) for ours, name in _SPECIAL.items()}
    contents: dict[str, dict[str, Any]] = {
        "config.json": {**config, "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))},
        "tokenizer.json": tokenizer,
        TOKENIZER_CONFIG: {ours: names[index] for ours, index in special.items() if index is not None},
    }
    if sampling := _sampling(metadata):
        contents["generation_config.json"] = sampling
    template = metadata.text("tokenizer.chat_template", None)
    try:
        folder = Path(tempfile.mkdtemp(dir=_process_folder())) / header.path.stem
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        if template is not None:
            (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: its tokenizer can't be written to a temporary folder: {error}") from None
    return Unpacked(folder, files)


def _sampling(metadata: Metadata) -> dict[str, Any]:
    found = {ours: metadata.number(f"general.sampling.{name}", None) for ours, name in _SAMPLING.items()}
    found = {name: value for name, value in found.items() if value is not None}
    return {"do_sample": True, **found} if found else {}


@cache
def _process_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="isthmus-gguf-"))
    atexit.register(remove, folder)
    cleanups.append(lambda: remove(folder))
    return folder
