"""Streams a published folder's weights onto devices: each shard of each parameter is read from the mapped file by
itself, converted on its device, and forgotten by the host before the next one but one is read."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.config import ConfigError, ModelConfig
from model.huggingface.families import Family
from model.huggingface.files import TensorFiles
from model.huggingface.tensors import Piece, Table
from model.transformer import Params, abstract_params, kept_dtype

Tick = Callable[[int], None]
"""Called with the bytes read since the last call."""

_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Constants that old folders store."""


@dataclass(frozen=True)
class Part:
    """One array of the file(s) that a parameter, or a slice [index] of it along leading axes, comes from."""

    name: str
    piece: Piece
    shape: tuple[int, ...]
    """Of the parameter's slice"""


def parts_of(config: ModelConfig, table: Table, path: str, shape: tuple[int, ...]) -> Part | list:
    """What the parameter at `path` ("blocks/0-3/mlp/up/kernel" in the stacked layout, "blocks/0/…" in the other) is
    made of: a part, or a list of them along its leading axis."""
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
    if not piece.by_expert:
        return Part(piece.name.format(layer=layer), piece, shape)
    names = [piece.name.format(layer=layer, expert=expert) for expert in range(shape[0])]
    return [Part(name, piece, shape[1:]) for name in names]


def leaves_of(parts: Part | list) -> Iterator[Part]:
    if isinstance(parts, Part):
        yield parts
    else:
        for part in parts:
            yield from leaves_of(part)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "blocks/0/mlp/up/kernel"."""
    return "/".join(entry.key for entry in path)


def load_params(
    folder: Path,
    family: Family,
    config: ModelConfig,
    mesh: Mesh,
    dtype: str | None = None,
    tick: Tick = lambda _: None,
) -> Params:
    """The parameters of a published folder, sharded over `mesh`, in the layout that `config` asks for.

    dtype: what to keep matrices in (see kept_dtype); None is float32. Raises ConfigError for files that are damaged,
    tensors that are missing, surplus or of another shape, and weights that are not finite.
    """
    files = TensorFiles(folder)
    abstract = abstract_params(config, mesh)
    flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    table = family.table(config)
    plan = [parts_of(config, table, path_name(path), leaf.shape) for path, leaf in flat]
    check_tensors(files, config, plan)
    todo = list(zip(plan, (leaf for _, leaf in flat), strict=True))
    done: list[jax.Array] = []
    finite: list[jax.Array] = []
    # One parameter is read while the one before it is converted.
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        ahead = [reader.submit(_read, files, config, *todo[0])]
        for index, (parts, leaf) in enumerate(todo):
            if index + 1 < len(todo):
                ahead.append(reader.submit(_read, files, config, *todo[index + 1]))
            raw = ahead.pop(0).result()
            array, is_finite = _convert(raw, config, parts, leaf, kept_dtype(flat[index][0], dtype))
            array.block_until_ready()
            del raw
            done.append(array)
            finite.append(is_finite)
            tick(sum(files.tensors[part.name].nbytes for part in leaves_of(parts)))
    for parts, is_finite in zip(plan, finite, strict=True):
        if not is_finite:
            names = [part.name for part in leaves_of(parts)]
            more = f" or one of {len(names) - 1} like it" if len(names) > 1 else ""
            raise ConfigError(f"{folder}: {names[0]}{more} holds numbers that are not finite")
    return jax.tree.unflatten(treedef, done)


def check_tensors(files: TensorFiles, config: ModelConfig, plan: Sequence[Part | list]) -> None:
    """Raises ConfigError naming a tensor that is missing, of another shape than the configuration's, or surplus."""
    wanted: set[str] = set()
    for parts in plan:
        for part in leaves_of(parts):
            wanted.add(part.name)
            if part.name not in files.tensors:
                raise ConfigError(f"{files.folder}: the tensor {part.name} is missing")
            shape, found = part.piece.shape(part.shape, config), files.tensors[part.name].shape
            if found != shape:
                raise ConfigError(
                    f"{files.folder}: {part.name} has the shape {list(found)}, and config.json makes it {list(shape)}"
                )
    for name in sorted(set(files.tensors) - wanted):
        if not _may_be_left(files, config, name):
            raise ConfigError(f"{files.folder}: the tensor {name} is no part of this architecture")


def _may_be_left(files: TensorFiles, config: ModelConfig, name: str) -> bool:
    if _IGNORED.search(name):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and config.latent.rank and int(layer[1]) == config.layers:
        return True  # DeepSeek-V3's layer for predicting two tokens at once, which ordinary inference leaves out
    if name == "lm_head.weight" and config.tie_embeddings:
        embedding = "model.embed_tokens.weight"
        same = embedding in files.tensors and np.array_equal(files.array(name), files.array(embedding))
        if not same:
            raise ConfigError(
                f"{files.folder}: tie_word_embeddings is true, but lm_head.weight differs from {embedding}"
            )
        return True
    return False


@dataclass(frozen=True)
class _Raw:
    """A parameter as the file has it: its axes in the file's order, in the file's dtype, on its devices."""

    array: jax.Array
    axes: tuple[int, ...]
    """Where each of the parameter's axes lies in `array`"""


def _read(files: TensorFiles, config: ModelConfig, parts: Part | list, leaf: jax.ShapeDtypeStruct) -> _Raw:
    for part in leaves_of(parts):
        files.array(part.name)
        files.advise(part.name, mmap.MADV_WILLNEED)
    views = _views(files, config, parts)
    lead = len(leaf.shape) - _first(views).ndim
    strides = _first(views).strides
    # In the file's own order a copy runs at memory's speed; the device turns the axes.
    order = (*range(lead), *(lead + axis for axis in sorted(range(len(strides)), key=lambda a: -strides[a])))
    spec = (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))
    sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))

    def fetch(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(order)
        ours = tuple(index[order.index(axis)] for axis in range(len(order)))
        return _take(views, ours, order)

    shape = tuple(leaf.shape[axis] for axis in order)
    array = jax.make_array_from_callback(shape, sharding, fetch)
    array.block_until_ready()
    for part in leaves_of(parts):
        files.advise(part.name, mmap.MADV_DONTNEED)
    return _Raw(array, tuple(order.index(axis) for axis in range(len(order))))


def _views(files: TensorFiles, config: ModelConfig, parts: Part | list) -> Any:
    if isinstance(parts, Part):
        return parts.piece.view(files.array(parts.name), parts.shape, config)
    return [_views(files, config, part) for part in parts]


def _first(views: Any) -> np.ndarray:
    return _first(views[0]) if isinstance(views, list) else views


def _take(views: Any, index: tuple[slice, ...], order: tuple[int, ...]) -> np.ndarray:
    """A copy of views[index] with its axes in `order`; the leading axes, where views is a list, stay in front."""
    if not isinstance(views, list):
        lead = len(order) - views.ndim
        return np.array(views[index].transpose([axis - lead for axis in order[lead:]]), order="C")
    first, *rest = (_take(view, index[1:], order) for view in views[index[0]])
    return np.stack([first, *rest])


def _convert(
    raw: _Raw, config: ModelConfig, parts: Part | list, leaf: jax.ShapeDtypeStruct, dtype: str
) -> tuple[jax.Array, jax.Array]:
    order = next(leaves_of(parts)).piece.order_of(config)
    program = _conversion(raw.axes, None if order is None else tuple(order.tolist()), dtype, leaf.sharding)
    return program(raw.array)


@lru_cache(maxsize=256)
def _conversion(
    axes: tuple[int, ...], order: tuple[int, ...] | None, dtype: str, sharding: NamedSharding
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    def convert(raw: jax.Array) -> tuple[jax.Array, jax.Array]:
        array = raw.transpose(axes)
        array = array if order is None else array[..., np.asarray(order)]
        return array.astype(dtype), jnp.isfinite(raw).all()

    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return partial(jax.jit(convert, out_shardings=(sharding, replicated)))
