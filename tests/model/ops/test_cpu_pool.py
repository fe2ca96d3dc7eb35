"""Kernels called from many threads at once: they share one pool of workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.model.ops.attention import Scoring
from isthmus.model.ops.cpu import library
from isthmus.model.ops.cpu.packed import multiply, pack
from isthmus.model.ops.paged_attention import paged_step
from isthmus.model.ops.paged_cache import PagedCache, PagedStep

THREADS, CALLS = 8, 60


def linear_task(seed: int) -> Callable[[], np.ndarray]:
    """A product of its own sizes, as small as a token's or as large as a prompt's."""
    rng = np.random.default_rng(seed)
    inputs, outputs, rows = (int(rng.integers(low, high)) for low, high in ((20, 300), (100, 900), (1, 40)))
    dtype = (jnp.float32, jnp.bfloat16)[seed % 2]
    weight = pack(jnp.asarray(rng.normal(size=(inputs, outputs)), dtype), inputs)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    program = jax.jit(lambda x, weight: multiply(x, [weight])[0])
    return lambda: np.asarray(program(x, weight))


def attention_task(seed: int) -> Callable[[], np.ndarray]:
    rng = np.random.default_rng(seed)
    rows, heads, head_dim = int(rng.integers(1, 12)), 2, 32

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v = (normal(rows, heads, head_dim) for _ in range(3))
    pages = normal(rows * 8, 16, 2 * heads, head_dim)
    step = PagedStep(
        rows,
        jnp.asarray(rng.permutation(rows * 8).reshape(rows, 8), jnp.int32),
        jnp.asarray(rng.integers(0, 128, rows), jnp.int32),
    )

    @jax.jit
    def program(pages: jax.Array) -> jax.Array:
        cache = PagedCache(pages)
        return paged_step(q, k, v, cache, jnp.int32(0), step, Scoring(0.2), None, implementation="cpu")[0]

    return lambda: np.asarray(program(pages))


@pytest.mark.usefixtures("kernels")
def test_threads_that_call_at_once_get_their_own_results() -> None:
    """XLA runs independent kernels side by side, and a process may hold several engines: none may wait for ever, or do
    another's work."""
    tasks = [(attention_task if seed % 4 == 3 else linear_task)(seed) for seed in range(THREADS)]
    want = [task() for task in tasks]
    together = threading.Barrier(THREADS)

    def call_often(index: int) -> None:
        together.wait()
        for call in range(CALLS):
            mine = (index + call) % THREADS
            np.testing.assert_array_equal(tasks[mine](), want[mine])

    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(call_often, index) for index in range(THREADS)]:
            done.result(timeout=300)


def test_every_task_is_done_once_and_seen_by_its_caller(tmp_path: Path) -> None:
    """The pool by itself, with callers that come together and pauses in which its workers fall asleep."""
    compiler = library.find_compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = compile_stress(compiler, tmp_path)
    subprocess.run([program], check=True, timeout=300)


@pytest.mark.slow
def test_the_pool_has_no_races(tmp_path: Path) -> None:
    """A race is a wrong token once a week."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = compile_stress(compiler, tmp_path, "-fsanitize=thread", "-g")
    # Without address randomization, which ThreadSanitizer's map of the memory doesn't expect in every kernel.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    subprocess.run([*prefix, program], check=True, timeout=500, env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})


def compile_stress(compiler: str, folder: Path, *flags: str) -> Path:
    program = folder / "pool_stress"
    sources = [Path(__file__).with_name("pool_stress.cc"), library.SOURCES / "pool.cc"]
    arguments = ["-O2", "-std=c++20", "-pthread", f"-I{library.SOURCES}", *flags]
    subprocess.run([compiler, *arguments, *map(str, sources), "-o", str(program)], check=True)
    return program
