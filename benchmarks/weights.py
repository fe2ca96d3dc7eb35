"""`isthmus bench weights`: loading a published folder or a GGUF file, beside reading its files and nothing more."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.models import as_served, preset
from isthmus.benchmarks.progress import progress_bar
from isthmus.benchmarks.record import Record
from isthmus.benchmarks.statistics import median
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params, abstract_params
from isthmus.model.weights.folder import ModelFolder
from isthmus.model.weights.huggingface.export import published_config
from isthmus.model.weights.huggingface.families import read_config, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.files import INDEX, TensorFiles
from isthmus.model.weights.huggingface.load import leaves_of, load_params, parts_of, path_name
from isthmus.serve.engine.build import open_model


@dataclass(frozen=True)
class WeightsBench:
    """How fast weights are read onto the device, and how much host memory that takes."""

    model: Path | None = None
    """A folder with safetensors, or a GGUF file in one part; without one, random bfloat16 weights of --preset are
    written to a temporary folder"""
    preset: str = "1b"
    vocab_size: int = 32000
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the weights are kept in"""
    quantize: str = "none"
    """With --model: integers made while loading, as serving takes it; what a file holds as integers that we can keep
    stays so in any case, as when it is served"""
    repeats: int = 5
    """Of each, in turns"""
    warm: bool = False
    """Leave the files in the page cache, instead of dropping them before each reading"""
    out: Path | None = None
    """Folder of the results; default ./benchmarks/results where there is one, else ./bench-results"""


def run(config: WeightsBench, console: Console) -> Record:
    """Raises ConfigError for a model that can't be read."""
    if config.model is not None:
        kept = config.dtype if config.quantize == "none" else config.quantize
        return _measure(config, _Served(config.model, config), f"{config.model.resolve().stem}-{kept}", console)
    if config.quantize != "none":
        raise ConfigError("quantize: with --model only; what --preset writes is loaded as it is")
    with temporary_folder("isthmus-bench-") as temporary:
        model = as_served(preset(config.preset, config.vocab_size))
        write_random(temporary, model)
        return _measure(config, _Tensors(temporary, config), f"{config.preset}-{config.dtype}", console)


class _Loading(Protocol):
    """One way to load a model, opened anew each time: what is mapped doesn't leave the page cache."""

    def files(self) -> list[Path]: ...

    def load(self, mesh: Mesh) -> Params: ...


class _Served(_Loading):
    """A model with all that belongs to it, as serving loads it."""

    def __init__(self, path: Path, config: WeightsBench) -> None:
        self._path, self._config = path, config
        if not self.files():
            raise ConfigError(f"model: {path} is neither a folder with safetensors nor a GGUF file")

    def _open(self) -> ModelFolder:
        return open_model(self._path, self._config.dtype, quantize=self._config.quantize)

    def files(self) -> list[Path]:
        return [self._path] if self._path.is_file() else sorted(self._path.glob("*.safetensors"))

    def load(self, mesh: Mesh) -> Params:
        return self._open().load_params(mesh, self._config.dtype)


class _Tensors(_Loading):
    """A folder of tensors alone."""

    def __init__(self, path: Path, config: WeightsBench) -> None:
        self._path, self._dtype = path, config.dtype

    def files(self) -> list[Path]:
        return sorted({stored.file for stored in TensorFiles(self._path).tensors.values()})

    def load(self, mesh: Mesh) -> Params:
        family, model = read_config(self._path / "config.json")
        return load_params(TensorFiles(self._path), family, model, mesh, self._dtype)


def write_random(folder: Path, model: ModelConfig, shards: int = 3) -> None:
    """A published folder of random bfloat16 weights."""
    values = published_config(model)
    family, _ = read_fields(Fields(dict(values), folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(values))
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 22)).astype(ml_dtypes.bfloat16)
    tensors: dict[str, np.ndarray] = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract_params(model))
    for path, leaf in flat:
        for part in leaves_of(parts_of(model, family.table(model), path_name(path), leaf.shape)):
            tensors[part.name] = np.resize(noise, part.piece.shape(part.shape, model))
    number = {name: index * shards // len(tensors) + 1 for index, name in enumerate(tensors)}
    placed = {name: f"model-{number[name]:05d}-of-{shards:05d}.safetensors" for name in tensors}
    for file in sorted(set(placed.values())):
        save_file({name: array for name, array in tensors.items() if placed[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def _measure(config: WeightsBench, loading: _Loading, subject: str, console: Console) -> Record:
    files = loading.files()
    size = sum(file.stat().st_size for file in files)
    mesh = build_mesh(MeshShape())
    plain, loaded, memory = [], [], []
    with progress_bar(console, "reading and loading", config.repeats) as tick:
        for _ in range(config.repeats):
            _drop(files, config.warm)
            start = time.perf_counter()
            _read_plainly(files)
            plain.append(time.perf_counter() - start)
            _drop(files, config.warm)
            with HostMemory() as host:
                start = time.perf_counter()
                params = jax.block_until_ready(loading.load(mesh))
                loaded.append(time.perf_counter() - start)
            kept = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            # On CPU the model's own arrays are host memory, too.
            memory.append(host.peak - (kept if mesh.devices.flat[0].platform == "cpu" else 0))
            del params
            gc.collect()
            tick()
    figures = {
        "bytes": size,
        "largest_file": max(file.stat().st_size for file in files),
        "read_seconds": plain,
        "load_seconds": loaded,
        "share_of_reading": median(plain) / median(loaded),
        "host_bytes_above_model": max(memory),
        "dtype": config.dtype,
        "warm": config.warm,
    }
    return Record("weights", subject, describe(), dataclasses.asdict(config), figures)


def _drop(files: list[Path], warm: bool) -> None:
    """Out of the page cache: what is measured is the disk."""
    for file in files:
        with file.open("rb") as opened:
            if not warm:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_plainly(files: list[Path]) -> None:
    """As cat does."""
    buffer = bytearray(1 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


class HostMemory:
    """The most memory that this process held at once, above what it held at the start: `peak`, bytes."""

    def __enter__(self) -> HostMemory:
        self.peak, self._start, self._done = 0, _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, _resident() - self._start)

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, _resident() - self._start)
        self._done.set()
        self._thread.join()


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        raise ConfigError("bench weights reads /proc, which only Linux has") from None


def show(record: Record, console: Console) -> None:
    figures = record.figures
    table = Table("what", "seconds, median", "GB/s", title=f"{record.subject}: {figures['bytes'] / 1e9:.2f} GB")
    for name, key in (("reading the files", "read_seconds"), ("loading the model", "load_seconds")):
        seconds = median(figures[key])
        table.add_row(name, f"{seconds:.2f}", f"{figures['bytes'] / seconds / 1e9:.2f}")
    console.print(table)
    console.print(
        f"loading runs at {figures['share_of_reading']:.0%} of plain reading; host memory above the model's own: "
        f"{figures['host_bytes_above_model'] / 1e9:.2f} GB (the largest file has {figures['largest_file'] / 1e9:.2f})",
        highlight=False,
    )
