"""The kernels for CPUs that this machine may not have: all compile, and what runs here, or under qemu, is right."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from isthmus.model.ops.cpu import library

pytestmark = pytest.mark.slow

X86 = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "skylake-avx512", "cascadelake", "sapphirerapids", "znver4")
ARM = ("armv8-a", "armv8.2-a+dotprod", "armv9-a")
MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
HERE = MACHINES.get(platform.machine(), "")


def compiler_for(machine: str) -> str:
    """For this machine, or one that compiles for the other."""
    found = library.find_compiler() if machine == HERE else shutil.which(f"{machine}-linux-gnu-g++")
    if found is None:
        pytest.skip(f"there is no compiler for {machine}")
    return found


def compile_source(machine: str, target: str, *arguments: str) -> None:
    compiler = compiler_for(machine)
    empty = ["-x", "c++", "-c", "/dev/null", "-o", "/dev/null"]
    unknown = subprocess.run([compiler, f"-march={target}", *empty], capture_output=True)
    if unknown.returncode:
        pytest.skip(f"{compiler} doesn't know {target}")
    flags = [*library.FLAGS, f"-march={target}", f"-I{jax.ffi.include_dir()}", f"-I{library.SOURCES}"]
    done = subprocess.run([compiler, *flags, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@cache
def qemu(machine: str) -> str | None:
    return shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")


TARGETS = [*(("x86_64", target) for target in X86), *(("aarch64", target) for target in ARM)]
LONG = ("x86-64-v2", "skylake-avx512", "cascadelake", "znver4")
"""Targets of which no branch is their own"""
CHECKED = [
    (*target, check) for target in TARGETS[:3] + TARGETS[len(X86) :] for check in ("linear_check", "attention_check")
]
LONG_CHECK = ("x86_64", "x86-64", "linear_check")
"""Takes minutes; in CI scripts/check_kernels.sh runs the kernels for this target"""


def marked(cases: Iterable[tuple[str, ...]]) -> list[Any]:
    long = lambda case: case[1] in LONG or case == LONG_CHECK  # noqa: E731
    return [pytest.param(*case, marks=[pytest.mark.long] if long(case) else []) for case in cases]


@pytest.mark.parametrize("machine, target", marked(TARGETS))
def test_it_compiles(machine: str, target: str, tmp_path: Path) -> None:
    """A name misspelt in a branch for vectors that this machine lacks would show only at a user's first start."""
    for source in sorted(library.SOURCES.glob("*.cc")):
        # Unoptimized, which takes half as long and finds the same.
        compile_source(machine, target, "-O0", "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o"))


@pytest.mark.parametrize("source", ["attention.cc", "linear.cc", "linear_int8.cc"])
def test_the_compiler_keeps_what_is_asked_for_early(source: str, tmp_path: Path) -> None:
    """gcc drops calls of a function that only prefetches: nothing would be wrong, but rows would wait for memory."""
    assembly = tmp_path / "kernel.s"
    compile_source(HERE, "native", "-S", str(library.SOURCES / source), "-o", str(assembly))
    assert ("prfm" if HERE == "aarch64" else "prefetch") in assembly.read_text()


@pytest.mark.parametrize("machine, target, check", marked(CHECKED))
def test_it_computes_what_plain_loops_do(machine: str, target: str, check: str, tmp_path: Path) -> None:
    """Vectors of 4 lanes with and without instructions for bytes, and of 8. AVX-512 has no emulator here."""
    program = tmp_path / check
    sources = [Path(__file__).with_name(f"{check}.cc"), library.SOURCES / "pool.cc"]
    compile_source(machine, target, "-static", *map(str, sources), "-o", str(program))
    command = [str(program)]
    if machine != HERE:
        emulator = qemu(machine)
        if emulator is None:
            pytest.skip(f"there is no qemu-{machine}")
        command = [emulator, "-cpu", "max", *command]
    elif target == "x86-64-v3" and "avx2" not in library._cpu():
        pytest.skip("this CPU has no AVX2")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"with {8 if target == 'x86-64-v3' else 4} lanes" in done.stdout
