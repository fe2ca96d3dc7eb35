"""Runs llama.cpp's llama-perplexity, which writes a model's predictions of a text to a file, and measures how far those
of a quantized model are from them.

The file (`--kl-divergence-base`, as tools/perplexity/perplexity.cpp of llama.cpp 0c1e57098 writes it) is little-endian:
"_logits_", uint32 n_ctx, int32 vocabulary, int32 windows, int32[windows, n_ctx] tokens. Then, for each token of each
window from n_ctx / 2 on, except the window's last, it has the distribution of the token that follows: float32 scale,
float32 least, and uint16[vocabulary, rounded up to an even number] q, where the log-probabilities are scale * q +
least. Tokens 16 nats or more below the likeliest have q = 0.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from isthmus.benchmarks.processes import BenchError
from isthmus.errors import ConfigError
from isthmus.quality.divergence import Divergence

MAGIC = b"_logits_"
HEADER = np.dtype([("magic", "S8"), ("n_ctx", "<u4"), ("vocab", "<i4"), ("windows", "<i4")])


@dataclass(frozen=True)
class BaseLogits:
    """A file of predictions, which are read from it when they are needed."""

    path: Path
    n_ctx: int
    vocab: int
    windows: int

    @classmethod
    def open(cls, path: Path) -> BaseLogits:
        """Reads the header. Raises ConfigError for another kind of file, or for one that isn't complete."""
        try:
            with path.open("rb") as file:
                data = file.read(HEADER.itemsize)
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"base: {path} can't be read: {error.strerror}") from None
        if len(data) < HEADER.itemsize or not data.startswith(MAGIC):
            raise ConfigError(f"base: {path} is not a file that llama-perplexity --kl-divergence-base makes")
        _, n_ctx, vocab, windows = np.frombuffer(data, HEADER)[0].item()
        found = cls(path, n_ctx, vocab, windows)
        rows = windows * found.predicted * found._row.itemsize
        if min(n_ctx - 3, vocab, windows) < 1 or size != found._start + rows:
            raise ConfigError(f"base: {path} was not written to its end; write it again")
        return found

    @property
    def predicted(self) -> int:
        """How many tokens of a window are predicted: all after the first one of the second half."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def _row(self) -> np.dtype:
        """The dtype of a token's distribution in the file."""
        return np.dtype([("scale", "<f4"), ("least", "<f4"), ("q", "<u2", max(0, self.vocab + self.vocab % 2))])

    @property
    def _start(self) -> int:
        """The byte at which the distributions begin."""
        return HEADER.itemsize + 4 * self.windows * self.n_ctx

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32[windows, n_ctx], as they are in the text. llama.cpp gives the model another first token in each window,
        if its texts begin with a token of their own."""
        flat = np.fromfile(self.path, "<i4", self.windows * self.n_ctx, offset=HEADER.itemsize)
        return flat.reshape(self.windows, self.n_ctx)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields float32[predicted, vocab], the log-probabilities of a window."""
        size = self.predicted * self._row.itemsize
        for window in range(self.windows):
            rows = np.fromfile(self.path, self._row, self.predicted, offset=self._start + window * size)
            yield rows["q"][:, : self.vocab] * rows["scale"][:, None] + rows["least"][:, None]


TRIES = 3
"""How often llama-perplexity is run until its output is whole: it doesn't wait for its printing thread at its end"""


def write_base(llama: Path, model: Path, text: Path, path: Path, windows: int, n_ctx: int, threads: int) -> None:
    """Writes a GGUF file's predictions of a text, with a float32 cache. llama: the folder that `make peers-llama`
    makes. Raises BenchError."""
    partial = path.with_name(path.name + ".partial")
    arguments = ["-f", str(text), "--chunks", str(windows), "-ctk", "f32", "-ctv", "f32"]
    _run(llama, model, n_ctx, threads, [*arguments, "--kl-divergence-base", str(partial)])
    partial.rename(path)


def divergence(llama: Path, model: Path, base: BaseLogits, threads: int) -> Divergence:
    """How far a GGUF file's predictions, by llama.cpp with its defaults, are from the base's. Raises BenchError."""
    arguments = ["--kl-divergence", "--kl-divergence-base", str(base.path)]
    for left in reversed(range(TRIES)):
        output = _run(llama, model, base.n_ctx, threads, arguments)
        try:
            return parse(output, base.windows * base.predicted)
        except BenchError:
            if not left:
                raise
    raise AssertionError


def _run(llama: Path, model: Path, n_ctx: int, threads: int, arguments: list[str]) -> str:
    program = llama / "bin" / "llama-perplexity"
    size = ["-c", str(n_ctx), "-b", str(n_ctx), "-t", str(threads)]
    try:
        done = subprocess.run([str(program), "-m", str(model), *size, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise BenchError(f"{program} can't be run: {error.strerror}; `make peers-llama` builds it") from None
    if done.returncode:
        raise BenchError(f"llama-perplexity -m {model} failed:\n" + "\n".join(done.stderr.splitlines()[-5:]))
    return done.stdout


def parse(output: str, tokens: int) -> Divergence:
    """The figures that llama-perplexity --kl-divergence prints last. Raises BenchError when they are missing."""

    def figures(name: str) -> tuple[float, float]:
        found = re.search(rf"^{re.escape(name)}\s*:\s*(\S+) ± +([^\s%]+)", output, re.MULTILINE)
        if found is None:
            raise BenchError(f"llama-perplexity said nothing of {name!r}: {output[-300:]!r}")
        return float(found[1]), float(found[2])

    (kl, error), (same, _) = figures("Mean    KLD"), figures("Same top p")
    return Divergence(tokens, kl, error, same / 100, figures("Mean PPL(Q)")[0], figures("Mean PPL(base)")[0])
