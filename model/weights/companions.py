"""The files beside a model's weights that are copied with them, such as the tokenizer and the license."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

PUBLISHED_CONFIG = "huggingface.json"
"""The name under which a folder of ours keeps the config.json of the published model that it was made from."""

COMPANION_FILES = (
    *("*token*.json", "tokenizer.model*", "*.model", "*vocab*.json", "*vocab*.txt", "*merges*.txt"),
    *("*.spm", "*.tiktoken", "tekken*.json"),
    *("*chat_template*.json", "*chat_template*.jinja", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "*processor_config.json"),
    *("*licen[cs]e*", "*notice*", "*use_policy*"),
)
"""Patterns of file names in lower case. They cover tokenizers in every file format, chat templates, settings of
generation and of processors, and terms of use. They leave out files that describe the weights, and unrelated files."""

LEFT_BEHIND = frozenset(
    [
        *(".py", ".pyc", ".so", ".sh"),
        *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".npy", ".npz", ".onnx"),
        *(".safetensors", ".msgpack", ".gguf"),
    ]
)
"""Suffixes of code, pickles and weights. Such files are never copied, whatever their names are."""

MOST_BYTES = 256 << 20
"""The largest file that is copied, in bytes."""


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files that match COMPANION_FILES from one model folder to another. Existing files are overwritten."""
    for path in (*source.glob("*"), *source.glob("additional_chat_templates/*")):
        name = path.relative_to(source).as_posix()
        if any(fnmatchcase(name.lower(), pattern) for pattern in COMPANION_FILES) and _may_travel(path):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


def _may_travel(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() not in LEFT_BEHIND and path.stat().st_size <= MOST_BYTES
