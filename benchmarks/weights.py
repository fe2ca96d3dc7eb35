"""`isthmus bench weights`: loading a published folder or a GGUF file, compared with only reading its files."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from safetensors.numpy import save_file

from isthmus.benchmarks.case import Bench, Qualities, progress_bar
from isthmus.benchmarks.figures import median, number, paragraphs, table
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.models import preset
from isthmus.benchmarks.record import Record
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params, abstract_params, parameter_specs
from isthmus.model.weights.huggingface.export import published_config
from isthmus.model.weights.huggingface.families import read_config, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.files import INDEX, TensorFiles
from isthmus.model.weights.huggingface.load import PublishedSource, leaves_of, parts_of
from isthmus.model.weights.load import load_params
from isthmus.serve.engine.build import open_model

MEASURED = (("reading the files", "read_seconds"), ("loading the model", "load_seconds"))
"""What is timed, and under which name"""


@dataclass(frozen=True)
class WeightsBench(Bench):
    """Measures how fast weights are read onto the device, and how much host memory that takes."""

    model: Path | None = None
    """A folder with safetensors, or a GGUF file in one part; by default, random bfloat16 weights of --preset are
    written to a temporary folder"""
    preset: str = "1b"
    """Size of the model with random weights"""
    vocab_size: int = 32000
    """Vocabulary of the model with random weights"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype in which the weights are kept"""
    quantize: str = "none"
    """With --model: integers to make while loading, as for `isthmus serve --quantize`; integers in the file that we can
    keep are kept in any case, as when it is served"""
    repeats: int = 5
    """How often the files are read and the model is loaded, in turns"""
    warm: bool = False
    """Leave the files in the page cache, instead of dropping them before each reading"""

    def validate(self) -> None:
        self.check_least(repeats=1)
        if self.model is None and self.quantize != "none":
            raise ConfigError("quantize: only with --model; the weights of --preset are loaded as they are")


def run(config: WeightsBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError for a model that can't be read."""
    if config.model is not None:
        path, kept = config.model, config.dtype if config.quantize == "none" else config.quantize
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"model: {path} is neither a folder with safetensors nor a GGUF file")
        return _measure(config, files, partial(_load_served, path, config), f"{path.resolve().stem}-{kept}", console)
    with temporary_folder("isthmus-bench-") as path:
        write_random(path, preset(config.preset, config.vocab_size))
        files = sorted(path.glob("*.safetensors"))
        return _measure(config, files, partial(_load_tensors, path, config), f"{config.preset}-{config.dtype}", console)


# Both functions open the files anew each time, because a mapped file doesn't leave the page cache.


def _load_served(path: Path, config: WeightsBench, mesh: Mesh) -> Params:
    """Loads a model and all that belongs to it, as serving does."""
    return open_model(path, config.dtype, quantize=config.quantize).load_params(mesh, config.dtype)


def _load_tensors(path: Path, config: WeightsBench, mesh: Mesh) -> Params:
    """Loads a folder that has nothing but config.json and tensors."""
    family, model = read_config(path / "config.json")
    source = PublishedSource(TensorFiles(path), family, model, mesh)
    return load_params(source, abstract_params(model, mesh, dtype=config.dtype))


def write_random(folder: Path, model: ModelConfig, shards: int = 3) -> None:
    """Writes a folder in Hugging Face's layout with random bfloat16 weights, in `shards` files."""
    values = published_config(model)
    family, _ = read_fields(Fields(dict(values), folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(values))
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 22)).astype(ml_dtypes.bfloat16)
    tensors: dict[str, np.ndarray] = {}
    for path, spec in parameter_specs(model).items():
        for part in leaves_of(parts_of(model, family.table(model), path, spec.shape)):
            tensors[part.name] = np.resize(noise, part.piece.shape(part.shape, model))
    number = {name: index * shards // len(tensors) + 1 for index, name in enumerate(tensors)}
    placed = {name: f"model-{number[name]:05d}-of-{shards:05d}.safetensors" for name in tensors}
    for file in sorted(set(placed.values())):
        save_file({name: array for name, array in tensors.items() if placed[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def _measure(
    config: WeightsBench, files: list[Path], load: Callable[[Mesh], Params], subject: str, console: Console
) -> Record:
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
                params = jax.block_until_ready(load(mesh))
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
    """Drops the files from the page cache, so that the disk is measured, unless they are to stay `warm`."""
    for file in files:
        with file.open("rb") as opened:
            if not warm:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_plainly(files: list[Path]) -> None:
    """Reads every byte, as cat does."""
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


def show(record: Record, _: Qualities) -> str:
    figures, made = record.figures, record.config.get("quantize", "none")
    kept = figures["dtype"] + ("" if made == "none" else f", with matrices made {made} while loading")
    cache = "in" if figures["warm"] else "dropped from"
    text = (
        f"Files of {figures['bytes'] / 1e9:.2f} GB, {cache} the page cache; weights are kept in {kept}. "
        f"Host memory above the model's own: {figures['host_bytes_above_model'] / 1e9:.2f} GB (the largest file: "
        f"{figures['largest_file'] / 1e9:.2f} GB). Loading is {figures['share_of_reading']:.0%} as fast as reading."
    )
    rows = [[what, number(figures["bytes"] / median(figures[key]) / 1e9)] for what, key in MEASURED]
    return paragraphs(text, table(("", "GB/s"), rows))


def notes(record: Record) -> str:
    return ", ".join(f"{what}: {median(record.figures[key]):.2f} s" for what, key in MEASURED) + ", medians."
