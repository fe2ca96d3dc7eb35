"""llama.cpp's llama-perplexity: a model's predictions of a text in a file, and how far a quantized one's are from them.

The file (`--kl-divergence-base`, read off tools/perplexity/perplexity.cpp of llama.cpp 0c1e57098), little-endian:
"_logits_", uint32 n_ctx, int32 vocabulary, int32 windows, int32[windows, n_ctx] tokens; then for each window, and in it
for each token but the last from n_ctx / 2 on, the distribution of the token after it: float32 scale, float32 least, and
uint16[vocabulary, made even] q, log-probabilities being scale * q + least. What is 16 nats or more below the likeliest
token is 0.
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
    """Such a file, read where it lies."""

    path: Path
    n_ctx: int
    vocab: int
    windows: int

    @classmethod
    def open(cls, path: Path) -> BaseLogits:
        """Raises ConfigError for what is no such file, or only a part of one."""
        try:
            with path.open("rb") as file:
                data = file.read(HEADER.itemsize)
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"base: {path} can't be read: {error.strerror}") from None
        if len(data) < HEADER.itemsize or not data.startswith(MAGIC):
            raise ConfigError(f"base: {path} is no file of llama-perplexity's --kl-divergence-base")
        _, n_ctx, vocab, windows = np.frombuffer(data, HEADER)[0].item()
        found = cls(path, n_ctx, vocab, windows)
        rows = windows * found.predicted * found._row.itemsize
        if min(n_ctx - 3, vocab, windows) < 1 or size != found._start + rows:
            raise ConfigError(f"base: {path} was not written to its end; write it again")
        return found

    @property
    def predicted(self) -> int:
        """Tokens of a window that are predicted: those after the first half and one more."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def _row(self) -> np.dtype:
        """A token's distribution."""
        return np.dtype([("scale", "<f4"), ("least", "<f4"), ("q", "<u2", max(0, self.vocab + self.vocab % 2))])

    @property
    def _start(self) -> int:
        """Where the distributions begin."""
        return HEADER.itemsize + 4 * self.windows * self.n_ctx

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32[windows, n_ctx], as the text has them: a model that wants a text to begin with a token of its own gets
        that in the place of each window's first."""
        flat = np.fromfile(self.path, "<i4", self.windows * self.n_ctx, offset=HEADER.itemsize)
        return flat.reshape(self.windows, self.n_ctx)

    def __iter__(self) -> Iterator[np.ndarray]:
        """float32[predicted, vocab] of log-probabilities for each window."""
        size = self.predicted * self._row.itemsize
        for window in range(self.windows):
            rows = np.fromfile(self.path, self._row, self.predicted, offset=self._start + window * size)
            yield rows["q"][:, : self.vocab] * rows["scale"][:, None] + rows["least"][:, None]


TRIES = 3
"""llama-perplexity prints from a thread that its end doesn't wait for: now and then the last lines are lost"""


def write_base(llama: Path, model: Path, text: Path, path: Path, windows: int, n_ctx: int, threads: int) -> None:
    """Writes the predictions of a GGUF file of a text, with a float32 cache. Raises BenchError."""
    partial = path.with_name(path.name + ".partial")
    arguments = ["-f", str(text), "--chunks", str(windows), "-ctk", "f32", "-ctv", "f32"]
    _run(llama, model, n_ctx, threads, [*arguments, "--kl-divergence-base", str(partial)])
    partial.rename(path)


def divergence(llama: Path, model: Path, base: BaseLogits, threads: int) -> Divergence:
    """How far a GGUF file's predictions are from the base's, as llama.cpp runs it by default. Raises BenchError."""
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
    """What llama-perplexity --kl-divergence says at its end. Raises BenchError when it doesn't."""

    def figures(name: str) -> tuple[float, float]:
        found = re.search(rf"^{re.escape(name)}\s*:\s*(\S+) ± +([^\s%]+)", output, re.MULTILINE)
        if found is None:
            raise BenchError(f"llama-perplexity said nothing of {name!r}: {output[-300:]!r}")
        return float(found[1]), float(found[2])

    (kl, error), (same, _) = figures("Mean    KLD"), figures("Same top p")
    return Divergence(tokens, kl, error, same / 100, figures("Mean PPL(Q)")[0], figures("Mean PPL(base)")[0])
