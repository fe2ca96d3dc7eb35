"""Streams the weights of a published folder onto devices. Each shard of each parameter is read separately from the
mapped file, and the host frees it soon after."""

from __future__ import annotations

import math
import mmap
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import jax
import numpy as np
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.ops.linear import Weight
from isthmus.model.transformer import Params, parameter_specs
from isthmus.model.weights.huggingface.families import Family
from isthmus.model.weights.huggingface.files import WeightFiles
from isthmus.model.weights.huggingface.integers import Kept, kept_matrix, read_integers
from isthmus.model.weights.huggingface.tensors import Piece, Table, as_stored
from isthmus.model.weights.load import Read

_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
"""The names of constants that old folders store."""


@dataclass(frozen=True)
class Part:
    """A published tensor from which a parameter comes, or a slice of it along leading axes."""

    name: str
    piece: Piece
    shape: tuple[int, ...]
    """The shape of the parameter, or of its slice"""
    other_name: str = ""
    """The name of this tensor in files that store it otherwise, or of the first one where these have several"""


def parts_of(config: ModelConfig, table: Table, path: str, shape: tuple[int, ...]) -> Part | list:
    """Returns what a parameter is made of: a part, or a list along its leading axis, whose entries may be lists too.
    path: such as "blocks/0-3/mlp/up/kernel" in the stacked layout, or "blocks/0/…" in the unstacked one."""
    if not path.startswith("blocks/"):
        return Part(table[path].name, table[path], shape)
    _, run, rest = path.split("/", 2)
    first, _, last = run.partition("-")
    if last:
        layers = range(int(first), int(last) + 1)
        return [_layer_parts(config, table, layer, rest, shape[1:]) for layer in layers]
    return _layer_parts(config, table, int(first), rest, shape)


def _layer_parts(config: ModelConfig, table: Table, layer: int, path: str, shape: tuple[int, ...]) -> Part | list:
    piece = table[f"blocks/{path}"] if f"blocks/{path}" in table else table[f"sparse/{path}"]
    if config.layer_kind(layer).sparse and f"sparse/{path}" in table:
        piece = table[f"sparse/{path}"]
    other = piece.otherwise.name.format(layer=layer, expert=0) if piece.otherwise else ""
    if not piece.by_expert:
        return Part(piece.name.format(layer=layer), piece, shape, other)
    names = [piece.name.format(layer=layer, expert=expert) for expert in range(shape[0])]
    return [Part(name, piece, shape[1:], other) for name in names]


def leaves_of(parts: Part | list) -> Iterator[Part]:
    if isinstance(parts, Part):
        yield parts
    else:
        for part in parts:
            yield from leaves_of(part)


@dataclass(frozen=True)
class PublishedSource:
    """A source of the parameters of a published model. Each shard of each parameter is read separately."""

    files: WeightFiles
    family: Family
    config: ModelConfig
    mesh: Mesh
    kept_integers: Mapping[str, Kept] = field(default_factory=dict)
    """The matrices that keep the integers of the files, as `integer_matrices` returns them"""

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return self.files.nbytes

    def reads(self, abstract: Params) -> Iterator[Read]:
        """Yields one read per parameter. Raises ConfigError for damaged files, for tensors that are missing, surplus or
        of another shape, and for weights that are not finite."""
        table = as_stored(self.family.table(self.config), self.files.tensors)
        plan = {path: parts_of(self.config, table, path, leaf.shape) for path, leaf in abstract.items()}
        check_tensors(self.files, self.config, list(plan.values()))
        for path, parts in plan.items():
            names = sorted({part.name for part in leaves_of(parts)})
            size = sum(self.files.tensors[name].nbytes for name in names)
            yield Read(size, partial(self._read, path, abstract[path], parts, names))

    def _read(self, path: str, leaf: jax.ShapeDtypeStruct, parts: Part | list, names: Sequence[str]) -> Params:
        for name in names:
            self.files.advise(name, mmap.MADV_WILLNEED)
        weight: Weight
        if path in self.kept_integers:
            weight = read_integers(self.files, self.kept_integers[path], self.mesh)
        else:
            weight = _place(self.files, self.config, parts, leaf)
        for name in names:
            self.files.advise(name, mmap.MADV_DONTNEED)
        return {path: weight}


def integer_matrices(files: WeightFiles, family: Family, config: ModelConfig) -> dict[str, Kept]:
    """The matrices that are published as integers and that one of our formats holds exactly, by their paths in the
    unstacked layout. Raises ConfigError."""
    found: dict[str, Kept] = {}
    table = as_stored(family.table(config), files.tensors)
    for path, spec in parameter_specs(config).items():
        if not spec.role.is_matrix:
            continue
        part = parts_of(config, table, path, spec.shape)
        if not isinstance(part, Part) or part.name not in files.tensors:
            continue
        if files.tensors[part.name].shape != part.piece.shape(part.shape, config):
            continue
        view = partial(_whole, config, part)
        if kept := kept_matrix(files, part.name, view, spec):
            found[path] = kept
    return found


def _whole(config: ModelConfig, part: Part, raw: np.ndarray) -> np.ndarray:
    """The whole parameter that `part` describes, in our order. raw: the tensor."""
    view, order = part.piece.view(raw, part.shape, config), part.piece.order_of(config)
    return view if order is None else np.take(view, order, axis=-1)


def check_size(files: WeightFiles, config: ModelConfig) -> None:
    """Raises ConfigError where the configuration describes a larger model than the files hold, before anything of its
    size is allocated."""
    layers = {int(match[1]) for name in files.tensors if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    if config.layers > len(layers):
        raise ConfigError(f"{files.folder}: {files.says} says num_hidden_layers={config.layers}, and the files hold "
                          f"{len(layers)} layers")  # fmt: skip
    held = sum(math.prod(stored.shape) for stored in files.tensors.values())
    if config.parameters > 2 * held:  # smaller differences are left to check_tensors, which names the tensor
        raise ConfigError(
            f"{files.folder}: {files.says} makes a model of {config.parameters:,} parameters, and the files hold "
            f"{held:,}: {_first_difference(files, config)}"
        )


def _first_difference(files: WeightFiles, config: ModelConfig) -> str:
    shape = (config.vocab_size, config.dim)
    found = files.tensors.get("model.embed_tokens.weight")
    if found is not None and found.shape != shape:
        return f"model.embed_tokens.weight is {list(found.shape)}, and {files.says} makes it {list(shape)}"
    return "one of its sizes is too large"


def check_tensors(files: WeightFiles, config: ModelConfig, plan: Sequence[Part | list]) -> None:
    """Raises ConfigError naming a tensor that is missing, surplus, or of another shape than the configuration gives
    it."""
    wanted: set[str] = set()
    for parts in plan:
        for part in leaves_of(parts):
            wanted.add(part.name)
            if part.name not in files.tensors:
                raise ConfigError(f"{files.folder}: the tensor {part.name} is missing{_hint(part.name)}")
            shape, found = part.piece.shape(part.shape, config), files.tensors[part.name].shape
            if found != shape:
                raise ConfigError(
                    f"{files.folder}: {part.name} has the shape {list(found)}, and {files.says} makes it {list(shape)}"
                )
    for name in sorted(set(files.tensors) - wanted):
        if not _may_be_left(files, config, name):
            raise ConfigError(f"{files.folder}: the tensor {name} is no part of this architecture")


def _hint(name: str) -> str:
    if name != "lm_head.weight":
        return ""
    return "; if the head is the embedding, set tie_word_embeddings to true in config.json"


def _may_be_left(files: WeightFiles, config: ModelConfig, name: str) -> bool:
    if _IGNORED.search(name) or files.means_nothing(name):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and config.latent.rank and int(layer[1]) == config.layers:
        return True  # DeepSeek-V3's layer for multi-token prediction, which ordinary inference leaves out
    if name == "lm_head.weight" and config.tie_embeddings:
        embedding = "model.embed_tokens.weight"
        same = embedding in files.tensors and np.array_equal(files.array(name), files.array(embedding))
        if not same:
            raise ConfigError(
                f"{files.folder}: the head is the embedding (tie_word_embeddings is true), but the files hold an "
                f"{name} that differs from {embedding}: set tie_word_embeddings to false in config.json to use it, as "
                "transformers does, or delete the tensor"
            )
        return True
    return False


def _place(files: WeightFiles, config: ModelConfig, parts: Part | list, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads a parameter onto its devices, each shard separately."""
    by_index: dict[tuple, list[jax.Device]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        if device.process_index == jax.process_index():
            key = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
            by_index.setdefault(key, []).append(device)
    shards = []
    for key, devices in by_index.items():
        host = _fetch(files, config, parts, np.dtype(leaf.dtype), tuple(slice(*bounds) for bounds in key))
        # The next shard may be written to the same memory.
        shards += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _fetch(
    files: WeightFiles, config: ModelConfig, parts: Part | list, dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """Returns the part of a parameter at `index`, in `dtype`. The result is a transposed view of an array whose axes
    are in the file's order. So the host copies at the speed of memory, and the axes are transposed only once, by JAX's
    transfer, which is best at it.

    The result is valid until the next call on this thread.
    """
    lead, chosen = _chosen(parts, index)
    order = chosen[0][0].piece.order_of(config)
    views = (_view(files, config, part, cut, dtype) for part, cut in chosen)  # a view is valid until the next one
    first = next(views)
    axes = tuple(sorted(range(first.ndim), key=lambda axis: -first.strides[axis]))  # the order of axes in memory
    wide = [axis for axis in axes if first.shape[axis] > 1]  # an axis of size 1 may be anywhere in that order
    transposed = wide != sorted(wide)
    shape = (*lead, *(first.shape[axis] for axis in axes))
    if transposed and not lead and first.dtype == dtype:
        stored = first.transpose(axes)
    else:
        # The device may keep an array that isn't transposed without copying it. So that needs memory of its own.
        stored = _scratch(shape, dtype) if transposed else np.empty(shape, dtype)
        for target, view in zip(stored.reshape(-1, *shape[len(lead) :]), chain((first,), views), strict=True):
            np.copyto(target, view.transpose(axes), casting="unsafe")
    if order is not None:
        stored = np.take(stored, order[index[-1]], axis=len(lead) + axes.index(len(axes) - 1))
    return stored.transpose(*range(len(lead)), *(len(lead) + axes.index(axis) for axis in range(len(axes))))


def _chosen(parts: Part | list, index: tuple[slice, ...]) -> tuple[tuple[int, ...], list[tuple[Part, tuple]]]:
    """Applies `index` to a list of parts. Returns the shape of the leading axes, and each part that is left with its
    own index."""
    if isinstance(parts, Part):
        return (), [(parts, index)]
    found = [_chosen(part, index[1:]) for part in parts[index[0]]]
    return (len(found), *found[0][0]), [each for _, chosen in found for each in chosen]


def _view(files: WeightFiles, config: ModelConfig, part: Part, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """Returns a part at `index`. The last axis is whole where it has yet to be reordered. Raises ConfigError for
    numbers that are not finite."""
    piece = part.piece
    cut = index if piece.order is None else (*index[:-1], slice(None))
    view = files.read(part.name, lambda raw: piece.view(raw, part.shape, config)[cut], dtype)
    if not _finite(view.transpose(sorted(range(view.ndim), key=lambda axis: -view.strides[axis]))):
        raise ConfigError(f"{files.folder}: {part.name} holds numbers that are not finite")
    return view


_THREAD = threading.local()


def _scratch(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array in memory that this thread reuses, because mapping new pages takes longer than writing to
    them."""
    size = math.prod(shape) * dtype.itemsize
    if getattr(_THREAD, "memory", np.empty(0, np.uint8)).nbytes < size:
        _THREAD.memory = np.empty(size, np.uint8)
    memory: np.ndarray = _THREAD.memory[:size]
    return memory.view(dtype).reshape(shape)


_EXPONENT = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}, 8: {"float64": 0x7FF << 52}}


def _finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite: whether no exponent is all ones. This is four times as fast as isfinite, which
    ml_dtypes computes number by number."""
    bits = array.view(f"u{array.dtype.itemsize}")
    mask = bits.dtype.type(_EXPONENT[array.dtype.itemsize][array.dtype.name])
    rows = max(1, (1 << 19) // max(1, bits[:1].size)) if bits.ndim else 1
    if bits.ndim == 0:
        return bool((bits & mask) != mask)
    return all(((bits[i : i + rows] & mask) != mask).all() for i in range(0, len(bits), rows))
