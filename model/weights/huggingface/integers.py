"""Finds the matrices of a published model whose integers our own formats hold exactly, and reads these integers."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isthmus.model.ops.quantized import Quantized, from_integers
from isthmus.model.parameter import Role, Spec
from isthmus.model.weights.huggingface.files import Exact, View, WeightFiles
from isthmus.model.weights.quantization import Format


class Kept(NamedTuple):
    """A matrix that keeps the integers of its file."""

    name: str
    """The name of the tensor that the matrix's outputs are taken from"""
    exact: Exact
    outputs: np.ndarray
    """The index of each output of the matrix among the tensor's outputs"""

    @property
    def kind(self) -> str:
        """The matrix's format as a rule of model/weights/quantization.py spells it."""
        return Format(self.exact.bits, self.exact.group, rotated=False, scales=self.exact.scales).kind


def kept_matrix(files: WeightFiles, name: str, view: View, spec: Spec) -> Kept | None:
    """Returns how a matrix keeps the integers of its file; None where it can't. It can where the tensor holds integers,
    and the matrix consists of some of the tensor's outputs, each with all inputs in their order. view: makes the matrix
    from the tensor."""
    held, shape, inputs = files.tensors[name].shape, spec.shape, spec.inputs
    embedding = spec.role is Role.EMBEDDING  # its inputs are its last axis
    axes = next((n for n in range(len(shape) + 1) if math.prod(shape[:n]) == inputs), None)
    if len(held) != 2 or held[1] != inputs or (axes is None and not embedding) or (exact := files.exact(name)) is None:
        return None
    rows, columns = (_indices(view, held, axis) for axis in range(2))
    if embedding:
        outputs, order = rows[..., 0].reshape(-1), columns[(0,) * (len(shape) - 1)]
    else:
        assert axes is not None
        outputs = rows[(0,) * axes].reshape(-1)
        order = columns[(slice(None),) * axes + (0,) * (len(shape) - axes)].reshape(-1)
    return Kept(name, exact, outputs) if np.array_equal(order, np.arange(inputs)) else None


def _indices(view: View, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """For each number of the matrix that `view` makes of a tensor of this shape, its index along one of the tensor's
    axes."""
    indices = np.arange(shape[axis])
    return view(np.broadcast_to(indices[:, None] if axis == 0 else indices, shape))


def _transposed_by_xla(matrix: np.ndarray) -> jax.Array:
    """Returns `matrix` as a JAX array. Where it lies transposed in memory, XLA transposes it, because numpy would do so
    byte by byte."""
    return jnp.asarray(matrix) if matrix.flags.c_contiguous else jnp.asarray(np.ascontiguousarray(matrix.T)).T


def read_integers(files: WeightFiles, kept: Kept, mesh: Mesh) -> Quantized:
    """Reads the matrix, split along its outputs where their number is a multiple of the size of the mesh's axis tp.
    Raises ConfigError for scales that are not finite."""
    found = files.integers(kept.name)
    chosen: slice | np.ndarray = kept.outputs
    if np.array_equal(kept.outputs, np.arange(found.values.shape[1])):
        chosen = slice(None)
    values, scales = (_transposed_by_xla(array[:, chosen]) for array in (found.values, found.scales))
    made = from_integers(values, scales, kept.exact.bits, kept.exact.group)
    split = "tp" if len(kept.outputs) % mesh.shape["tp"] == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(None, split))
    return jax.block_until_ready(jax.tree.map(lambda array: jax.device_put(array, sharding), made))
