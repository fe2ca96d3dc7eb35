"""The text that a quantized model is calibrated on, and the other text that it is compared with the original on."""

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
"""Tokens that are predicted together, the second half of them judged, as llama-perplexity does"""

PIECE = 1 << 18
"""Characters of a text that are encoded at once: of a long one, not more than is needed"""


@dataclass(frozen=True)
class TextConfig:
    text: tuple[str, ...] = ()
    """Files or folders of text, like --data of `isthmus train`: on its first --windows a quantized model is compared
    with the original, to the --calibration that follow it is fitted; default: documentation that Python brings"""
    windows: int = 64
    """Of 512 tokens, that are compared; the default text has about 150 of them"""
    calibration: int = 24
    """Windows of other text that integers of fewer than 8 bits are fitted to, which loses about a quarter as much as
    rounding to the nearest and takes minutes; 0 rounds"""


class Texts(NamedTuple):
    """No token of one is in the other."""

    calibration: np.ndarray
    """int32[windows, size]: perhaps none"""
    comparison: np.ndarray
    """int32[windows, size]"""
    warnings: tuple[str, ...]
    """What there is too little of"""


def texts(config: TextConfig, folder: ModelFolder, calibration: int = 0) -> Texts:
    """Neighbouring windows, each beginning as the tokenizer begins a text, of what `config` names: to compare first,
    and of what is left, `calibration` windows. Raises ConfigError for less than a window to compare."""
    size = min(WINDOW, folder.config.context_length)
    if config.text:
        documents = _distinct(read_documents(config.text, setting="text"))
        cut = _windows(folder.tokenizer, documents, config.windows + calibration, size)
        compared, calibrated = cut[: config.windows], cut[config.windows :]
    else:
        compared = _windows(folder.tokenizer, _default("evaluation", config.windows), config.windows, size)
        calibrated = _windows(folder.tokenizer, _default("calibration", calibration), calibration, size)
    if not len(compared):
        raise ConfigError(f"text: {', '.join(config.text)} has less than the {size} tokens that are predicted together")
    warnings = []
    for what, got, wanted in (("compare", compared, config.windows), ("calibrate on", calibrated, calibration)):
        if len(got) < wanted:
            warnings.append(
                f"text: {len(got)} of the {wanted} windows of {size} tokens to {what} are there; more text makes more"
            )
    return Texts(calibrated, compared, tuple(warnings))


def _default(half: corpus.Half, windows: int) -> Iterator[str]:
    """Enough for so many, of any tokenizer that was made for English."""
    if windows:
        yield corpus.text(half, windows * WINDOW * 8)


def _distinct(documents: Iterable[Document]) -> Iterator[str]:
    """What is there twice would be compared after it was calibrated on."""
    seen = set()
    for document in documents:
        if document.digest not in seen:
            seen.add(document.digest)
            yield document.text


def _windows(tokenizer: Tokenizer, documents: Iterable[str], most: int, size: int) -> np.ndarray:
    """int32[at most `most`, size]."""
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
    """Cut at the ends of lines, where there are any."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
