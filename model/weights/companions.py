"""What lies beside a model's weights and goes with them wherever they go."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

PUBLISHED_CONFIG = "huggingface.json"
"""In a folder of ours that was made from a published one: the config.json of that"""

COMPANION_FILES = (
    *("*token*.json", "tokenizer.model*", "*.model", "*vocab*.json", "*vocab*.txt", "*merges*.txt"),
    *("*.spm", "*.tiktoken", "tekken*.json"),
    *("*chat_template*.json", "*chat_template*.jinja", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "*processor_config.json"),
    *("*licen[cs]e*", "*notice*", "*use_policy*"),
)
"""Names in lower case: tokenizers in every way that one is written down, chat templates, settings of generation and of
processors, and the terms of use. Neither what describes the weights, nor what lies in a folder by chance."""

LEFT_BEHIND = frozenset(
    [
        *(".py", ".pyc", ".so", ".sh"),
        *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".npy", ".npz", ".onnx"),
        *(".safetensors", ".msgpack", ".gguf"),
    ]
)
"""Code, pickles and weights, whatever they are called"""

MOST_BYTES = 256 << 20
"""Of a file that goes along"""


def copy_companions(source: Path, target: Path) -> None:
    """Copies what COMPANION_FILES names from one model folder to another, over what is there."""
    for path in (*source.glob("*"), *source.glob("additional_chat_templates/*")):
        name = path.relative_to(source).as_posix()
        if any(fnmatchcase(name.lower(), pattern) for pattern in COMPANION_FILES) and _may_travel(path):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


def _may_travel(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() not in LEFT_BEHIND and path.stat().st_size <= MOST_BYTES
