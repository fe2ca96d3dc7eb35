"""The text on which a quantized model is calibrated, and other text on which it is compared with the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import ModelFolder
from isthmus.quality import corpus
from isthmus.train.documents import Document, read_documents

WINDOW = 512
"""Tokens that are predicted together; only the second half of them is judged, as llama-perplexity does"""

PIECE = 1 << 18
"""Characters of a text that are encoded at once, so that not much more of a long text is encoded than is needed"""


@dataclass(frozen=True)
class TextConfig:
    text: tuple[str, ...] = ()
    """Files or folders of text, as for `isthmus train`: a quantized model is compared with the original on its first
    --windows windows, and fitted to the next --calibration; by default, documentation that comes with Python"""
    windows: int = 64
    """How many windows of 512 tokens are compared; the default text has about 150"""
    calibration: int = 24
    """How many windows of other text integers of fewer than 8 bits are fitted to, which takes minutes and loses about
    a quarter as much as rounding to the nearest; 0 means to round"""


class Texts(NamedTuple):
    """Windows for calibration and for comparison, which share no token."""

    calibration: np.ndarray
    """int32[windows, size], perhaps of no windows"""
    comparison: np.ndarray
    """int32[windows, size]"""
    warnings: tuple[str, ...]
    """What to tell the user if there is too little text"""


def texts(config: TextConfig, folder: ModelFolder, calibration: int = 0) -> Texts:
    """Cuts the text that `config` names into neighbouring windows, which each begin as the tokenizer begins a text. The
    first are for comparison, and `calibration` of the next for calibration. Raises ConfigError if there is less than
    one window for comparison."""
    size = min(WINDOW, folder.config.context_length)
    if config.text:
        documents = _distinct(read_documents(config.text, setting="text"))
        cut = _windows(folder.tokenizer, documents, config.windows + calibration, size)
        compared, calibrated = cut[: config.windows], cut[config.windows :]
    else:
        compared = _windows(folder.tokenizer, _default("evaluation", config.windows), config.windows, size)
        calibrated = _windows(folder.tokenizer, _default("calibration", calibration), calibration, size)
    if not len(compared):
        raise ConfigError(f"text: {', '.join(config.text)} has less than the {size} tokens of one window")
    warnings = []
    for what, got, wanted in (("compare", compared, config.windows), ("calibrate on", calibrated, calibration)):
        if len(got) < wanted:
            warnings.append(
                f"text: {len(got)} of the {wanted} windows of {size} tokens to {what} are there; more text makes more"
            )
    return Texts(calibrated, compared, tuple(warnings))


def _default(half: corpus.Half, windows: int) -> Iterator[str]:
    """Enough of the default text for so many windows, with any tokenizer that was made for English."""
    if windows:
        yield corpus.text(half, windows * WINDOW * 8)


def _distinct(documents: Iterable[Document]) -> Iterator[str]:
    """The texts without repetitions, since one that is there twice could be both calibrated on and compared."""
    seen = set()
    for document in documents:
        if document.digest not in seen:
            seen.add(document.digest)
            yield document.text


def _windows(tokenizer: Tokenizer, documents: Iterable[str], most: int, size: int) -> np.ndarray:
    """At most `most` windows of the documents, int32[windows, size]."""
    begin = tokenizer.encode("")[:1]
    tokens: list[int] = list(begin)
    for piece in (piece for document in documents for piece in _pieces(document)):
        if len(tokens) >= most * size:
            break
        encoded = tokenizer.encode(piece)
        tokens += encoded[len(begin) :] if encoded[:1] == begin else encoded
    count = min(most, len(tokens) // size)
    windows = np.asarray(tokens[: count * size], np.int32).reshape(count, size)
    windows[:, : len(begin)] = begin
    return windows


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text into pieces of at most PIECE characters, at ends of lines if there are any."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
