"""A text that every machine has: Python's language reference, as pydoc shows it, and the docstrings of its library.

Each document is a topic or a module. They are divided into two disjoint halves: `calibration`, on which a quantized
model's scales are chosen, and `evaluation`, on which it is measured. A document's name decides its half. A paragraph
that two documents share belongs to the first alone. The text is the same for the same version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from pydoc_data import topics
from typing import Literal, get_args

Half = Literal["calibration", "evaluation"]
HALVES: tuple[Half, ...] = get_args(Half)

LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "encodings", "__pycache__"}
"""Modules and folders that aren't prose, or aren't installed everywhere"""

DOCUMENT_CHARACTERS = 3000
"""Most characters that are taken of a document, in whole paragraphs; a longer first paragraph is taken all the same"""

SHORT = 60
"""Paragraphs of fewer characters are left out: headings, signatures, single lines of code"""


def text(half: Half, size: int = 240_000) -> str:
    """About `size` characters; by default they make at least 40,000 tokens with any tokenizer made for English."""
    parts: list[str] = []
    taken = 0
    for name, document in sorted(_distinct().items(), key=lambda item: _digest(item[0])):
        if taken >= size:
            break
        if HALVES[_digest(name)[-1] % 2] == half:
            parts.append(document)
            taken += len(document)
    return "\n\n\n".join(parts) + "\n"


def write(folder: Path) -> dict[Half, Path]:
    """Writes FOLDER/calibration.txt and FOLDER/evaluation.txt, and makes the folder if it doesn't exist."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {half: folder / f"{half}.txt" for half in HALVES}
    for half, path in paths.items():
        path.write_text(text(half), encoding="utf-8")
    return paths


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@lru_cache(maxsize=1)
def _distinct() -> dict[str, str]:
    """Documents by name, without paragraphs that an earlier one has, and without documents of which nothing is left."""
    seen: set[str] = set()
    found = {}
    for name, document in _documents():
        kept: list[str] = []
        size = 0
        for paragraph in document.split("\n\n"):
            paragraph = paragraph.strip("\n")
            if len(paragraph) < SHORT or paragraph in seen:
                continue
            seen.add(paragraph)
            if not kept or size + len(paragraph) <= DOCUMENT_CHARACTERS:
                kept.append(paragraph)
                size += len(paragraph)
        if kept:
            found[name] = "\n\n".join(kept)[:DOCUMENT_CHARACTERS]
    return found


def _documents() -> Iterator[tuple[str, str]]:
    for name, topic in sorted(topics.topics.items()):
        yield f"topic {name}", topic
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        for path in [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]:
            where = path.relative_to(root)
            if path.is_file() and not LEFT_OUT & set(where.parts):
                yield str(where), "\n\n".join(_docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings in a file of Python source."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node, clean=False)
            if found:
                yield inspect.cleandoc(found)
