"""How the kernels come to a machine: compiled at first use, found again, and done without where that can't be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.model.ops.cpu import library

ROOT = Path(library.__file__).parents[4]
PRODUCTS = ("linear.cc", "pack.cc", "memory.cc", "pool.cc", "machine.cc")
"""Of the kernels' sources those for products of floats, which is what the processes here compile and call"""
SMALLER = """
import os
from pathlib import Path
from isthmus.model.ops.cpu import library
library.SOURCES = Path(os.environ["PRODUCTS"])
library.HANDLERS = ("allocate_array", "pack_matrix", "linear_float32", "linear_bfloat16")
library.FLAGS = (*library.FLAGS, "-O0")
"""
"""Which takes a quarter of the time that all of them take"""
MULTIPLY = f"""{SMALLER}
import numpy as np
from isthmus.model.ops.cpu.packed import multiply, pack
loaded = library.load()
print(loaded.path)
assert library.why_not() is None
for dtype in ("float32", "bfloat16"):
    assert (np.asarray(multiply(np.ones((7, 40), dtype), [pack(np.full((40, 30), 2, dtype), 40)])[0]) == 80).all()
"""
NAME = f"""{SMALLER}
print(f"{{library._native_name()}}-{{library._source_key()}}.so")
"""
WITHOUT = """
from isthmus.model.config import PRESETS
from isthmus.model.ops.cpu import library
from isthmus.model.ops.kernels import REFERENCES, choose, fallbacks
from isthmus.model.ops.operation import Setting
setting = Setting(PRESETS["5m"], "float32", "cpu", page_size=16, cache_dtype="float32")
assert choose("auto", setting) == REFERENCES
(line,) = fallbacks(REFERENCES, setting)
assert line.endswith(library.why_not()), line
print(line)
try:
    library.load()
except library.KernelError as error:
    assert str(error) == library.why_not()
else:
    raise AssertionError("it found kernels")
"""
RUNS_HERE = """
import sys
from pathlib import Path
from isthmus.model.ops.cpu.library import Library
print([Library(Path(path), "native").runs_here for path in sys.argv[1:]])
"""


def start(script: str, home: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own: a library is loaded once a process."""
    # No prefix of this environment holds libraries that its administrator has built.
    script = f"import sys\nsys.prefix = {str(home / 'prefix')!r}\n{script}"
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home), "TMPDIR": str(home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed.strip()


def run(script: str, home: Path, *arguments: str, **environment: str) -> str:
    return finish(start(script, home, *arguments, **environment))


def cache_of(home: Path) -> Path:
    return home / ".cache/isthmus/kernels"


@pytest.fixture(scope="module", autouse=True)
def products(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tells the processes where those sources are."""
    folder = tmp_path_factory.mktemp("products")
    for path in (*map(library.SOURCES.joinpath, PRODUCTS), *library.SOURCES.glob("*.h")):
        shutil.copy(path, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRODUCTS", str(folder))
        yield


@pytest.fixture(scope="module")
def built(kernels: library.Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the library of two processes that started together."""
    home = tmp_path_factory.mktemp("home")
    if library.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    both = [start(MULTIPLY, home), start(MULTIPLY, home)]
    paths = {finish(process) for process in both}
    assert len(paths) == 1
    return home


@pytest.fixture
def home(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(cache_of(built), cache_of(tmp_path))
    return tmp_path


def only_library(home: Path) -> Path:
    (path,) = cache_of(home).iterdir()
    return path


def test_two_processes_that_start_together_both_have_kernels(built: Path) -> None:
    """Two servers on a new machine: neither may load half a file of the other, or leave rubbish behind."""
    assert only_library(built).name == run(NAME, built)
    assert cache_of(built).stat().st_mode & 0o777 == 0o700


def test_the_next_process_finds_what_was_compiled(home: Path, tmp_path: Path) -> None:
    """A server that is started again is ready at once, and needs no compiler any more."""
    before = only_library(home).stat()
    assert run(MULTIPLY, home) == str(only_library(home))
    assert run(MULTIPLY, home, PATH=str(tmp_path)) == str(only_library(home))
    after = only_library(home).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_without_a_compiler_serving_goes_on_without_kernels(tmp_path: Path) -> None:
    """The reason names what to install."""
    said = run(WITHOUT, tmp_path, PATH=str(tmp_path))
    assert "no C++ compiler" in said and "install" in said and "g++" in said


def test_a_compiler_that_fails_is_a_reason_too(tmp_path: Path) -> None:
    """Its own words are in it: headers may be missing, or a flag unknown to it."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert "no such header" in run(WITHOUT, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert not list(cache_of(tmp_path).iterdir())


def test_a_damaged_library_is_never_loaded(home: Path, tmp_path: Path) -> None:
    """Loading a file that was cut short would kill the server before it could say a word."""
    whole = only_library(home).read_bytes()
    middle = len(whole) // 2
    damaged = {
        "whole": whole,
        "empty": b"",
        "header": whole[:64],
        "page": whole[:4096],
        "half": whole[:middle],
        "end": whole[:-1],
        "zeros": bytes(len(whole)),
        "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "text": b"not a library",
    }
    paths = []
    for name, content in damaged.items():
        paths.append(tmp_path / f"{name}.so")
        paths[-1].write_bytes(content)
    assert run(RUNS_HERE, home, *map(str, paths)) == str([True] + [False] * (len(damaged) - 1))
    assert run(RUNS_HERE, home, str(tmp_path / "missing.so")) == "[False]"


@pytest.mark.slow
def test_a_damaged_library_is_built_again(home: Path) -> None:
    """It lies where a good one belongs."""
    path = only_library(home)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert run(MULTIPLY, home) == str(path)
    assert len(path.read_bytes()) == len(whole)


@pytest.mark.slow
def test_a_folder_that_can_not_be_made_costs_only_time(tmp_path: Path) -> None:
    """Kernels are compiled for one process alone, and leave nothing behind."""
    (tmp_path / ".cache").write_text("a file, where a folder should be")
    process = start(MULTIPLY, tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    path = Path(printed.strip())
    assert tmp_path in path.parents and not path.exists()
    assert "compiled anew at every start" in errors and ".cache/isthmus/kernels can't be made" in errors
    assert [entry.name for entry in tmp_path.iterdir()] == [".cache"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_of_others_costs_only_time(tmp_path: Path, mode: int) -> None:
    """As above, where permissions say no."""
    (tmp_path / ".cache").mkdir(mode=mode)
    assert not Path(run(MULTIPLY, tmp_path)).exists()


def test_a_folder_that_can_not_be_written_is_a_reason(tmp_path: Path) -> None:
    """Asked to build there, and only there."""
    (tmp_path / "file").touch()
    with pytest.raises(library.KernelError, match="can't be made"):
        library.build(tmp_path / "file" / "kernels")


@pytest.mark.slow
def test_a_library_for_another_cpu_is_not_loaded(tmp_path: Path) -> None:
    """Built for all users of an environment, it may meet an older machine: an illegal instruction kills a server."""
    if library.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    if "avx512f" in library._cpu() or "avx2" not in library._cpu():
        pytest.skip("needs a CPU with AVX2 and without AVX-512")
    newer = library.build(tmp_path, "x86-64-v4", ["-O0"])
    assert run(RUNS_HERE, tmp_path, str(newer.path)) == "[False]"
    folder = cache_of(tmp_path)
    folder.mkdir(parents=True)
    key = run(NAME, tmp_path).rsplit("-", 1)[1]
    newer.path.rename(folder / f"x86-64-v4-{key}")
    older = library.build(tmp_path, "x86-64-v3", ["-O0"]).path.rename(folder / f"x86-64-v3-{key}")
    assert run(MULTIPLY, tmp_path) == str(older)
