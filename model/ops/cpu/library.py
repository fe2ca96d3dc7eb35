"""The kernels' shared library: compiled for this machine at first use, kept on disk, loaded once a process.

A library's file name says what it was made from (sources, compiler, flags, jaxlib's headers, CPU), so that nothing
stale is ever loaded. It appears by a rename when it is whole: processes that start together each make one, and the last
one wins.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib

from isthmus.model.process.cache_folder import CacheError, check_trusted, open_cache, user_cache
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.process.resources import free_main_memory, usable_cpus

SOURCES = Path(__file__).parent
HANDLERS = (
    "allocate_array",
    "pack_matrix",
    "linear_float32",
    "linear_bfloat16",
    "linear_groups_float32",
    "linear_groups_bfloat16",
    "linear_int8",
    "linear_int6",
    "linear_int5",
    "linear_int4",
    "lora_float32",
    "lora_bfloat16",
    "paged_attention",
    "causal_attention",
    "rms_norm",
    "rotate_pairs",
    "gated_product",
    "router_scores",
    "sample",
    "sample_adjusted",
    "read_flag",
    "log_probability",
)
"""What the library exports; each is the target "isthmus_NAME" of jax.ffi."""
COMPILERS = ("c++", "g++", "clang++")
COMPILER_BYTES = 500 << 20
"""Bytes of memory that one compiler takes (measured: g++ 12, linear.cc: 476 MB)."""
_NO_COMPILER = f"there is no C++ compiler ({', '.join(COMPILERS)}): install one, such as g++"
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=off", "-fPIC", "-pthread", "-w")


logger = logging.getLogger("isthmus.kernels")


class KernelError(RuntimeError):
    """The kernels can't be had here; the message says why and what to do."""


@dataclass(frozen=True)
class Library:
    """A compiled library."""

    path: Path
    target: str
    """What it was compiled for: "native", or the -march it was given"""

    @property
    def runs_here(self) -> bool:
        """Whether the file is whole, and this CPU has what it was compiled for."""
        try:
            return _is_sealed(self.path) and bool(ctypes.CDLL(str(self.path)).isthmus_runs_here())
        except (OSError, AttributeError):
            return False


def _seal(path: Path) -> None:
    """Ends a library with a hash of what comes before, which a loader doesn't look at."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)


def _is_sealed(path: Path) -> bool:
    """Whether all of it is there: a file that a crash or a full disk cut short kills the process that loads it."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def user_folder() -> Path:
    """Where libraries are kept for one user. Raises CacheError without a home."""
    return user_cache("kernels")


def shared_folder() -> Path:
    """Where `isthmus kernels build --shared` leaves them for all users of this Python environment."""
    return Path(sys.prefix) / "share" / "isthmus" / "kernels"


def find() -> list[Library]:
    """All libraries of these sources and this jaxlib, those for this very machine first."""
    found = []
    folders = [shared_folder()]
    with contextlib.suppress(CacheError):
        check_trusted(user_folder())
        folders.insert(0, user_folder())
    for folder in folders:
        for path in sorted(folder.glob(f"*-{_source_key()}.so")) if os.path.isdir(folder) else ():
            target = path.name[: -len(f"-{_source_key()}.so")]
            if target.startswith(_native_name()) or not target.startswith("native"):
                found.append(Library(path, target))
    return sorted(found, key=lambda library: not library.target.startswith("native"))


def build(folder: Path, target: str = "native", flags: Sequence[str] = ()) -> Library:
    """Compiles the kernels into `folder`, which is made where it isn't there: for this user alone, but for the shared
    one. Raises KernelError.

    target: -march. flags: further ones, a sanitizer's say, that the file's name doesn't tell.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelError(_NO_COMPILER)
    name = _native_name() if target == "native" else target
    try:
        if folder == shared_folder():
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        elif unwritable := open_cache(folder):
            raise KernelError(unwritable)
        with temporary_folder("building-", folder) as work:
            made = _compile(compiler, target, flags, work)
            path = folder / f"{name}-{_source_key()}.so"
            _seal(made)
            made.rename(path)
    except CacheError as error:
        raise KernelError(str(error)) from None
    except OSError as error:
        raise KernelError(f"{folder} can't be written to: {error}") from None
    return Library(path, target)


def _compile(compiler: str, target: str, flags: Sequence[str], work: Path) -> Path:
    flags = (*FLAGS, *flags)
    include = f"-I{jax.ffi.include_dir()}"
    sources = sorted(SOURCES.glob("*.cc"))

    def run(*arguments: str) -> None:
        done = subprocess.run([compiler, *arguments], capture_output=True, text=True, cwd=work)
        if done.returncode:
            raise KernelError(f"{compiler} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")

    with ThreadPoolExecutor(_compilers_at_once()) as workers:
        compile_flags = (*flags, f"-march={target}", include)
        list(workers.map(lambda source: run(*compile_flags, "-c", str(source), "-o", f"{source.stem}.o"), sources))
    run(*flags, "-shared", *(f"{source.stem}.o" for source in sources), "-o", "kernels.so")
    return work / "kernels.so"


def _compilers_at_once() -> int:
    return max(1, min(usable_cpus(), free_main_memory() // COMPILER_BYTES))


@cache
def load() -> Library:
    """Finds or builds the library, and registers its handlers with JAX. Raises KernelError."""
    usable = next((library for library in find() if library.runs_here), None)
    if usable is None:
        usable = _build_somewhere()
    _register(usable)
    return usable


@cache
def why_not() -> str | None:
    """Why this process can't have the kernels; None where it has them."""
    try:
        load()
    except KernelError as error:
        return str(error)
    return None


def _build_somewhere() -> Library:
    """In the user's folder, or where that can't be written, in a temporary one for this process alone."""
    try:
        folder = user_folder()
        why = open_cache(folder)
    except CacheError as error:
        why = str(error)
    if why is None:
        return build(folder)
    if find_compiler() is None:
        raise KernelError(_NO_COMPILER)
    logger.warning("the CPU's kernels are compiled anew at every start: %s", why)
    try:
        with temporary_folder("isthmus-kernels-") as folder:
            library = build(folder)
            _register(library)  # a loaded library needs its file no more
            return library
    except OSError as error:
        raise KernelError(f"there is no folder to compile the kernels in: {error}") from None


def function(name: str) -> Any:
    """A function of the library that is called from Python, through ctypes, and lets other threads go on. Raises
    KernelError."""
    return getattr(_register(load()), name)


@cache
def _register(library: Library) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(library.path))
    except OSError as error:  # its file system is mounted noexec, say
        raise KernelError(f"{library.path} can't be loaded: {error}") from None
    loaded.isthmus_use_threads(usable_cpus())
    for name in HANDLERS:
        jax.ffi.register_ffi_target(f"isthmus_{name}", jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return loaded


def find_compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


@cache
def _source_key() -> str:
    """A hash of what a library is made from, apart from the CPU and the compiler, which are this machine's."""
    key = hashlib.sha256(repr((FLAGS, jaxlib.__version__, platform.system(), platform.machine())).encode())
    for source in sorted((*SOURCES.glob("*.cc"), *SOURCES.glob("*.h"))):
        key.update(source.read_bytes())
    return key.hexdigest()[:16]


@cache
def _native_name() -> str:
    """ "native" with hashes of this CPU's abilities and of the compiler's version. Without a compiler the second is
    left out: a library will do whichever compiler made it."""
    compiler = find_compiler()
    if compiler is None:
        return f"native_{_key(_cpu())}"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return f"native_{_key(_cpu())}_{_key(version)}"


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _cpu() -> str:
    """The CPU's model and abilities, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "features", "cpu part", "cpu implementer")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(wanted)}))
