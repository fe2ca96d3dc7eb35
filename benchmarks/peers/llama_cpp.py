"""Answers the questions of protocol.py with llama.cpp's llama-batched-bench: `llama_cpp.py DIR`, where
setup_llama_cpp.sh made DIR.

The benchmark takes no token ids, only counts: each question runs it once, with as many random tokens as asked. It
decodes random tokens too, not its own, which costs the same. Its times are used as they are: `t_pp` for the prompts,
`t_tg` for the steps. They include the logits but not the choice of a token. Its other settings are the defaults:
batches of 2048 in parts of 512, a float16 cache. To decode, one prompt is computed and its cache copied to every
sequence, outside the timed part.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from protocol import answer, check, cores

TRIES = 5
"""How often the benchmark is run until it has a result: it prints from a thread and doesn't wait for it at its end, so
now and then the result is lost"""

GGUF_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class LlamaCpp:
    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"

    def load(self, model: str, dtype: str, max_sequences: int, context: int) -> dict:
        """model: a .gguf, or the folder beside which make_gguf.py put MODEL-TYPE.gguf. The file is mapped, so the
        seconds depend on how much of it is in the page cache; they include computing two tokens."""
        path = Path(model)
        kind = GGUF_NAMES.get(dtype, dtype)
        self.gguf = path if path.suffix == ".gguf" else path.parent / f"{path.name}-{kind}.gguf"
        if not self.gguf.is_file():
            raise ValueError(f"model: {self.gguf} does not exist; make_gguf.py makes it")
        self.limits = max_sequences, context
        start = time.perf_counter()
        self._run(1, 1, 1)
        return {
            "version": self._version(),
            "seconds": time.perf_counter() - start,
            "threads": len(cores()),
        }

    def prefill(self, tokens: list[list[int]]) -> dict:
        length = check(tokens, 1, *self.limits)
        return {"seconds": self._run(len(tokens), length, 1)["t_pp"]}

    def decode(self, tokens: list[list[int]], steps: int, sampling: dict | None = None) -> dict:
        if sampling is not None:
            raise ValueError(
                "sampling: llama-batched-bench chooses no tokens, so it can't say what choosing them costs"
            )
        length = check(tokens, steps, *self.limits)
        return {"seconds": self._run(len(tokens), length, steps, "-pps")["t_tg"]}

    def _run(self, sequences: int, prompt: int, steps: int, *options: str) -> dict:
        """Runs llama-batched-bench and returns the JSON that it prints."""
        threads = str(len(cores()))
        # One token more for a copy's dummy token; a sequence's part of the cache has a multiple of 256 tokens.
        room = -(-(prompt + steps + 1) // 256) * 256 * sequences
        counts = ["-npp", str(prompt), "-ntg", str(steps), "-npl", str(sequences), "-c", str(room)]
        arguments = ("-m", str(self.gguf), "-t", threads, "-tb", threads, *counts, *options, "--output-format", "jsonl")
        for _ in range(TRIES):
            output = self._call("llama-batched-bench", *arguments)
            lines = [line for line in output.splitlines() if line.startswith("{")]
            if len(lines) == 1:
                return json.loads(lines[0])
        raise RuntimeError(f"llama-batched-bench: no result in {output[-1000:]!r}")

    def _version(self) -> str:
        found = re.search(r"version: (.*)", self._call("llama-server", "--version"))
        return f"llama.cpp {found[1] if found else 'unknown'}, {self.gguf.name}"

    def _call(self, program: str, *arguments: str) -> str:
        """Returns what the program prints. Raises RuntimeError with the end of that when it fails."""
        done = subprocess.run([self.bin / program, *arguments], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"{program} exited with {done.returncode}: {done.stderr[-1000:]}")
        return done.stdout + done.stderr


if __name__ == "__main__":
    answer(LlamaCpp(Path(sys.argv[1])))
