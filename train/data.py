"""Tokens on disk, and batches from them. The batch of a step is a pure function of (seed, step).

Documents lie end to end in one flat file, as train/examples.py encodes them. If not every token is a target, a second
file holds a weight for each token. A sequence is a window of the file; segments and positions start anew with each
document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import ModelFolder
from isthmus.train.config import DataConfig
from isthmus.train.documents import Document, read_documents
from isthmus.train.examples import Encoder, FineTuning, Pretraining
from isthmus.train.files import Reading
from isthmus.train.heldout import split

TOKENIZER_SAMPLE_BYTES = 32 << 20
"""About the most text that the tokenizer is trained on; more would change its merges little and take long"""


class Batch(NamedTuple):
    """A step's sequences, on the host or the device. Each field is int32[accumulate, sequences, seq]; weights are
    float32."""

    tokens: Any
    targets: Any
    positions: Any
    segments: Any
    """The number of a token's document within the sequence; -1 in padding"""
    weights: Any
    """1 where the target counts; 0 where it doesn't, and in padding"""


@dataclass(frozen=True)
class TokenFile:
    """One split: the tokens of all its documents, and where each document ends."""

    tokens: np.ndarray
    ends: np.ndarray
    """int64[documents]: the index after each document's last token"""
    text_bytes: int
    weights: np.ndarray | None = None
    """uint8[tokens]: 1 where the token counts as a target; None means that every token does"""
    conversations: int = 0
    """Number of documents that are conversations"""
    tails: int = 0
    """Number of documents that are the held-out end of a text whose beginning is trained on"""

    @cached_property
    def targets(self) -> int:
        """How many tokens count as targets. The file's first token never does, because nothing precedes it."""
        return len(self.tokens) - 1 if self.weights is None else int(self.weights[1:].sum())

    @classmethod
    def open(cls, stem: Path) -> TokenFile:
        meta = json.loads(stem.with_suffix(".json").read_text())
        tokens = np.memmap(stem.with_suffix(".bin"), dtype=meta["dtype"], mode="r")
        weights = np.memmap(stem.with_suffix(".weights"), dtype=np.uint8, mode="r") if meta.get("weighted") else None
        ends = np.load(stem.with_suffix(".npy"))
        return cls(tokens, ends, meta["text_bytes"], weights, meta.get("conversations", 0), meta.get("tails", 0))

    @classmethod
    def write(
        cls, stem: Path, documents: Iterable[Document], encoder: Encoder, on_progress: Callable[[int], None]
    ) -> TokenFile:
        """Tokenizes into STEM.bin, .npy, .json and, if there are weights, .weights. The .json is written last, so that
        an interrupted write isn't taken for a complete one. Raises ConfigError when no token is a target."""
        dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
        ends, total, text_bytes, conversations, tails = [], 0, 0, 0, 0
        with ExitStack() as stack:
            file = stack.enter_context(stem.with_suffix(".bin").open("wb"))
            weights = stack.enter_context(stem.with_suffix(".weights").open("wb")) if encoder.weighted else None
            pending = iter(documents)
            while group := list(islice(pending, 256)):
                for example in encoder(group):
                    file.write(np.asarray(example.ids, dtype).data)
                    if weights is not None and example.weights is not None:
                        weights.write(example.weights.data)
                    total += len(example.ids)
                    ends.append(total)
                size = sum(d.size for d in group)
                text_bytes += size
                conversations += sum(d.kind == "messages" for d in group)
                tails += sum(d.tail for d in group)
                on_progress(size)
        np.save(stem.with_suffix(".npy"), np.asarray(ends, np.int64))
        meta = {
            "dtype": np.dtype(dtype).name,
            "tokens": total,
            "documents": len(ends),
            "conversations": conversations,
            "tails": tails,
            "text_bytes": text_bytes,
            "weighted": encoder.weighted,
        }
        stem.with_suffix(".json").write_text(json.dumps(meta))
        if total == 0:
            raise ConfigError(f"data: no document fell into the {stem.name} split; give more documents")
        split = cls.open(stem)
        if encoder.weighted and split.targets == 0:
            raise ConfigError(f"data: the {stem.name} split holds nothing to learn: none of its messages is an answer")
        return split

    def batch(self, starts: np.ndarray, seq: int) -> Batch:
        """The windows of `seq` tokens that begin at `starts` (int64, any shape); beyond the file is padding."""
        index = starts[..., None] + np.arange(seq + 1)
        valid = index < len(self.tokens)
        index = np.minimum(index, len(self.tokens) - 1)
        window = np.where(valid, self.tokens[index], 0).astype(np.int32)
        inside = index[..., :-1]
        document = np.searchsorted(self.ends, inside, side="right")
        begin = np.where(document > 0, self.ends[np.maximum(document - 1, 0)], 0)
        positions = (inside - np.maximum(begin, starts[..., None])).astype(np.int32)
        segments = np.where(valid[..., :-1], document - document[..., :1], -1).astype(np.int32)
        counts = valid[..., 1:]
        if self.weights is not None:
            counts = counts & (self.weights[index[..., 1:]] > 0)
        return Batch(window[..., :-1], window[..., 1:], positions, segments, counts.astype(np.float32))


@dataclass(frozen=True)
class TrainingData:
    """The two splits of a run's data, and the batches that are made of them."""

    train: TokenFile
    heldout: TokenFile
    seq: int
    seed: int

    def batch(self, step: int, sequences: int, accumulate: int) -> Batch:
        """The batch of `step`. Each epoch visits every window once, in its own order and from its own offset."""
        windows = max(1, (len(self.train.tokens) - 1) // self.seq)
        count = step * sequences + np.arange(sequences, dtype=np.int64)
        starts = np.empty(sequences, np.int64)
        for epoch in np.unique(count // windows):
            mine = count // windows == epoch
            key = np.random.default_rng([self.seed, int(epoch)]).integers(1 << 32, size=5, dtype=np.int64)
            shift = int(key[4]) % self.seq if windows > 1 else 0
            starts[mine] = permute(count[mine] % windows, windows, key[:4]) * self.seq + shift
        return self.train.batch(starts.reshape(accumulate, -1), self.seq)

    def heldout_batches(self, sequences: int) -> Iterator[Batch]:
        """All held-out windows in order. Empty windows fill up the last batch, so that it has the same shape."""
        total = len(self.heldout.tokens) - 1
        starts = np.arange(0, max(total, 1), self.seq, dtype=np.int64)
        starts = np.concatenate([starts, np.full(-len(starts) % sequences, len(self.heldout.tokens), np.int64)])
        for group in starts.reshape(-1, 1, sequences):
            yield self.heldout.batch(group, self.seq)


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) moves each index. It is computed instead of stored.

    It is a four-round Feistel network over the next even power of two, applied until the result is below `size` (Black
    and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). index, key: int64 arrays; key holds four 32-bit numbers.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    out = index.astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for k in key.astype(np.uint64):
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo[todo] = out[todo] >= size
    return out.astype(np.int64)


def prepare(
    paths: tuple[str, ...],
    config: DataConfig,
    folder: Path,
    seed: int,
    on_progress: Callable[[str, int], None] = lambda _, __: None,
    *,
    resume: bool = False,
    start: ModelFolder | None = None,
    reading: Reading | None = None,
) -> tuple[TrainingData, Tokenizer]:
    """Reads, splits and tokenizes the documents under `paths` into `folder`, or reuses what was made there of the same
    documents.

    on_progress(stage, bytes) is called as text is processed. start: the model to fine-tune, whose tokenizer is used.
    reading: records each file. Raises ConfigError when there is too little text to split, or `resume` is set and the
    text isn't the same.
    """
    reading = reading or Reading()
    documents = list(read_documents(paths, reading))
    if not documents:
        raise ConfigError(f"data: there is no text in {', '.join(paths)}: {reading}")
    stamp = folder / "data" / "source.json"
    settings: list[str | int | float] = [str(config.tokenizer), config.vocab_size, config.heldout_fraction]
    fine_tuning = FineTuning(start, config.parse_special) if start else None
    if fine_tuning:
        settings = [config.heldout_fraction, *fine_tuning.stamp]
    elif chats := [document.name for document in documents if document.kind == "messages"]:
        raise ConfigError(f"data: {chats[0]} holds messages: they need --init, a model with a chat template")
    settings += ["parse_special"] if config.parse_special else []
    source = json.dumps([_fingerprint(documents), *settings])
    stems = (folder / "data" / "train", folder / "data" / "heldout")
    if stamp.is_file() and stamp.read_text() == source:
        tokenizer = start.tokenizer if start else Tokenizer.load(folder / "tokenizer.json")
        train, heldout = map(TokenFile.open, stems)
        return TrainingData(train, heldout, config.seq, seed), tokenizer

    if resume:
        raise ConfigError(f"data: the text, or what is left of it in {folder / 'data'}, is not what the run began with")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    groups = split(documents, config.heldout_fraction)
    del documents  # a text that was cut is in memory twice
    if not groups.train or not groups.heldout:
        raise ConfigError("data: too little text to hold some out: give more of it, or conversations that differ")
    tokenizer = start.tokenizer if start else _tokenizer(groups.train, config, lambda n: on_progress("tokenizer", n))
    if start is None:
        tokenizer.save(folder / "tokenizer.json")
    encoder = fine_tuning or Pretraining(tokenizer, config.parse_special)
    train, heldout = (
        TokenFile.write(stem, group, encoder, lambda n: on_progress("tokenize", n))
        for stem, group in zip(stems, groups, strict=True)
    )
    stamp.write_text(source)
    return TrainingData(train, heldout, config.seq, seed), tokenizer


def _tokenizer(documents: list[Document], config: DataConfig, on_progress: Callable[[int], None]) -> Tokenizer:
    """The tokenizer that was asked for, or one trained on `documents`."""
    if config.tokenizer is None:
        return Tokenizer.train(_sample(documents, on_progress), config.vocab_size)
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.eos_id is None:
        raise ConfigError(f"text.tokenizer: {config.tokenizer} has no <|endoftext|> token to separate documents")
    return tokenizer


def _fingerprint(documents: Iterable[Document]) -> str:
    """A hash of the documents' contents and order. It doesn't depend on where they lie, so a folder may move."""
    return hashlib.sha256(b"".join(document.digest for document in documents)).hexdigest()


def _sample(documents: list[Document], on_progress: Callable[[int], None]) -> Iterator[str]:
    """Up to TOKENIZER_SAMPLE_BYTES of text, spread over all documents."""
    total = sum(len(d.text) for d in documents)
    stride = max(1, -(-total // TOKENIZER_SAMPLE_BYTES))
    for document in documents[::stride]:
        on_progress(len(document.text) * stride)
        yield document.text
