"""The examples run as they are, on a small model: whoever copies one begins with something that works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus import LLM, EngineConfig
from tests.serve.api.harness import RunningServer, compilation_cache_in

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *words: object, programs: Path) -> str:
    """What the example prints. programs: where compiled ones are kept."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # else JAX keeps none of these
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_without_arguments_it_says_how_it_is_called(name: str) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("usage: python ") and done.stderr.count("\n") == 1


def test_a_client_without_a_server_says_so() -> None:
    words = [sys.executable, str(EXAMPLES / "client.py"), "127.0.0.1:1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("127.0.0.1:1: ") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_llm(model_folder: Path, cache_folder: Path) -> None:
    lines = run("llm.py", model_folder, programs=cache_folder)
    assert len(re.findall(r"\(LENGTH, 24 tokens\)|\(EOS, \d+ tokens\)", lines)) == 4
    assert "'': prompt: must not be empty" in lines


@pytest.mark.slow
def test_async_streams(model_folder: Path, cache_folder: Path) -> None:
    assert run("async_streams.py", model_folder, programs=cache_folder).count("first token after") == 4


def test_client(server: RunningServer, cache_folder: Path) -> None:
    assert "temperature is refused: must be a number" in run("client.py", server.address, programs=cache_folder)


@pytest.mark.slow
def test_train_pjit(tmp_path: Path, cache_folder: Path) -> None:
    """It learns, over a mesh, and what it leaves can be served."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    said = run("train_pjit.py", text, tmp_path / "out", 60, "dp=2,fsdp=2,tp=2", programs=cache_folder)
    losses = [float(value) for value in re.findall(r": ([\d.]+) nats", said)]
    assert losses[-1] < 1 < losses[0] or losses[-1] < losses[0] / 2
    small = EngineConfig(max_sequences=1, prefill_tokens=32, draft_rows=0, steps_per_launch=1)
    with compilation_cache_in(cache_folder), LLM(tmp_path / "out", engine=small, progress=False) as llm:
        assert "lazy dog" in llm.generate("the quick brown fox jumps over the ", max_tokens=24, temperature=0).text
