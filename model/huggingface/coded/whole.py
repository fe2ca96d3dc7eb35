"""Which matrices of a published folder are integers that our own formats hold exactly, and these integers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.huggingface.coded.matrix import Coded, Exact
from model.huggingface.files import View
from model.ops.quantized import Quantized

Path = tuple[str, ...]


class Kept(NamedTuple):
    """A matrix that stays integers."""

    source: Coded
    outputs: np.ndarray
    """Which of the source's each of the matrix's is"""


def kind_of(exact: Exact | None) -> str | None:
    """The format of ours that holds such integers and scales exactly, as a rule of model/quantization.py names it."""
    if exact is not None and exact.bits == 8 and exact.whole:
        return "int8"
    if exact is not None and exact.bits == 4 and exact.group in (32, 64, 128) and exact.scales == ml_dtypes.bfloat16:
        return f"int4:{exact.group}"
    return None


def from_integers(integers: np.ndarray, scales: np.ndarray, bits: int) -> Quantized:
    """int8[inputs, outputs] and float32[groups, outputs], of a kind that kind_of knows."""
    if bits == 8:
        return Quantized(jnp.asarray(integers), jnp.asarray(scales))
    missing = -len(integers) % (math.ceil(len(integers) / len(scales) / 32) * 32)
    padded = np.pad(integers, ((0, missing), (0, 0))).view(np.uint8) + np.uint8(8)
    return Quantized(jnp.asarray(padded[0::2] | padded[1::2] << 4), jnp.asarray(scales, jnp.bfloat16))


def kept_matrix(source: Coded, view: View, shape: tuple[int, ...], inputs: int, *, turned: bool) -> Kept | None:
    """What a parameter of `shape` that is view(source's tensor) is made of, where it is outputs of it with all their
    inputs in order. inputs: of the matrix; turned: whether they are the parameter's last axis."""
    axes = next((n for n in range(len(shape) + 1) if math.prod(shape[:n]) == inputs), None)
    if len(source.shape) != 2 or source.shape[1] != inputs or (axes is None and not turned):
        return None
    rows, columns = (_indices(view, source.shape, axis) for axis in range(2))
    if turned:
        outputs, order = rows[..., 0].reshape(-1), columns[(0,) * (len(shape) - 1)]
    else:
        assert axes is not None
        outputs = rows[(0,) * axes].reshape(-1)
        order = columns[(slice(None),) * axes + (0,) * (len(shape) - axes)].reshape(-1)
    return Kept(source, outputs) if np.array_equal(order, np.arange(inputs)) else None


def _indices(view: View, shape: tuple[int, ...], axis: int) -> np.ndarray:
    indices = np.arange(shape[axis])
    return view(np.broadcast_to(indices[:, None] if axis == 0 else indices, shape))


def read_whole(kept: Kept, mesh: Mesh) -> Quantized:
    """The matrix, split along its outputs where the devices divide them. Raises ConfigError for scales that are not
    finite."""
    grid = kept.source.grid()
    exact = grid.exact
    assert exact is not None, "chosen by kind_of"
    integers = grid.integers() if kept.source.turned else grid.integers().T
    made = from_integers(
        np.ascontiguousarray(integers[:, kept.outputs]),
        np.ascontiguousarray(grid.scales_by_group()[:, kept.outputs]),
        exact.bits,
    )
    split = "tp" if len(kept.outputs) % mesh.shape["tp"] == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(None, split))
    return jax.block_until_ready(jax.tree.map(lambda array: jax.device_put(array, sharding), made))


_LAYER = re.compile(r"blocks/(\d+)/(.*)")


def rules_of(kinds: Mapping[Path, str]) -> tuple[str, ...]:
    """Rules of model/quantization.py that give each of these matrices its kind, and no other matrix any."""
    layers: dict[tuple[str, str], list[str]] = {}
    for path, kind in kinds.items():
        match = _LAYER.fullmatch("/".join(path))
        rest, layer = (match[2], match[1]) if match else ("/".join(path), "")
        layers.setdefault((rest, kind), []).append(layer)
    patterns: dict[tuple[str, str], list[str]] = {}
    for (rest, kind), found in layers.items():
        patterns.setdefault(("|".join(found), kind), []).append(rest)
    return tuple(
        f"{f'blocks/({numbers})/' if numbers else ''}({'|'.join(rests)})={kind}"
        for (numbers, kind), rests in patterns.items()
    )
