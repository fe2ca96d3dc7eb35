"""The parameters that are matrices of a plain product, and what can be made of them: integers, or what the CPU's
kernels read. Everything else (norms, biases, experts, what is multiplied head by head) stays an array."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from flax import nnx

from model.config import ModelConfig
from model.layers import Linear
from model.ops.cpu.packed import Packed, pack
from model.ops.linear import Weight
from model.ops.quantized import Quantized
from model.transformer import Params, abstract_module

Path = tuple[str, ...]


def matrix_inputs(config: ModelConfig) -> dict[Path, int]:
    """The inputs of each matrix by its path in the unstacked layout. The embedding's are the model's width: it is kept
    as the matrix that the head multiplies by."""
    found: dict[Path, int] = {("embedding",): config.dim}
    if not config.tie_embeddings:
        found[("head",)] = config.dim
    for path, module in nnx.iter_modules(abstract_module(config)):
        if type(module) is Linear:
            shape = module.kernel.get_value().shape
            found[(*map(str, path), "kernel")] = math.prod(shape[: module.inputs])
    return found


def as_matrix(path: Path, array: jax.Array, inputs: int) -> jax.Array:
    """[inputs, outputs]."""
    return array.T if path == ("embedding",) else array.reshape(inputs, -1)


def replace_matrices(config: ModelConfig, params: Params, change: Callable[[Path, Weight, int], Weight]) -> None:
    """Puts change(path, matrix, inputs) in the place of each, one at a time: what it replaces is freed before the next.

    params: unstacked; changed in place.
    """
    for path, inputs in matrix_inputs(config).items():
        *parents, name = path
        node = params
        for parent in parents:
            node = node[parent]
        node[name] = change(path, node[name], inputs)


def pack_params(config: ModelConfig, params: Params, tick: Callable[[int], None] = lambda size: None) -> None:
    """Lays out every matrix for the CPU's kernels, in place; tick(bytes) after each."""

    def change(path: Path, weight: Weight, inputs: int) -> Weight:
        if path == ("embedding",) and not config.tie_embeddings and not isinstance(weight, Quantized):
            return weight  # rows are only looked up
        transposed = path == ("embedding",)
        if isinstance(weight, jax.Array):
            weight = weight if transposed else as_matrix(path, weight, inputs)
        packed = weight if isinstance(weight, Packed) else pack(weight, inputs, transposed=transposed)
        jax.block_until_ready(packed.lines)
        tick(packed.lines.nbytes)
        return packed

    replace_matrices(config, params, change)
