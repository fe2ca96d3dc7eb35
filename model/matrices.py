"""The parameters that are matrices of a plain product, and what can be made of them: integers, or what the CPU's
kernels read. Everything else (norms, biases, experts, what is multiplied head by head) stays an array."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from flax import nnx

from model.config import ModelConfig
from model.layers import Linear
from model.ops.cpu.packed import Packed, put, stack_like
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
        node, name = _parent(params, path), path[-1]
        node[name] = change(path, node[name], inputs)


# Packed, matrices that are alike lie in one stack, apart from the blocks: a step's launch costs for every array.

_STACKS = "stacks"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """Matrices that are packed together."""

    matrices: Packed
    paths: tuple[Path, ...] = field(metadata={"static": True})
    """Where each of them belongs"""


def is_packed(params: Params) -> bool:
    return _STACKS in params


def pack_params(config: ModelConfig, params: Params, tick: Callable[[int], None] = lambda size: None) -> Params:
    """Parameters with every matrix laid out for the CPU's kernels, in stacks; `place_matrices` is for where they are
    multiplied.

    params: unstacked; each matrix is taken out of them, so that its memory is free before the next needs some.
    tick(bytes) after each.
    """
    alike: dict[tuple, list[tuple[Path, int]]] = {}
    for path, inputs in matrix_inputs(config).items():
        weight = _parent(params, path)[path[-1]]
        if path != ("embedding",) or config.tie_embeddings or isinstance(weight, Quantized):  # else only looked up
            alike.setdefault(_layout(path, weight, inputs), []).append((path, inputs))
    return {**params, _STACKS: [_pack_alike(params, members, tick) for members in alike.values()]}


def _layout(path: Path, weight: Weight, inputs: int) -> tuple:
    """What matrices of one stack have in common."""
    if isinstance(weight, Quantized):
        return (weight.bits, weight.group, inputs, *weight.integers_shape)
    assert isinstance(weight, jax.Array), "packed already"
    return (weight.dtype, inputs, weight.size, path == ("embedding",))


def _pack_alike(params: Params, members: list[tuple[Path, int]], tick: Callable[[int], None]) -> Stack:
    stack = None
    for index, (path, inputs) in enumerate(members):
        weight = _parent(params, path).pop(path[-1])
        transposed = path == ("embedding",) and not isinstance(weight, Quantized)
        if stack is None:
            stack = stack_like(len(members), weight, inputs, transposed=transposed)
        stack = put(stack, index, weight, transposed=transposed)
        del weight
        jax.block_until_ready(stack)
        tick(stack.lines.nbytes // len(members))
    assert stack is not None
    return Stack(stack, tuple(path for path, _ in members))


def place_matrices(params: Params) -> Params:
    """The parameters with every matrix in its place, whether they are packed or not."""
    placed: Params = jax.tree.map(lambda leaf: leaf, {name: params[name] for name in params if name != _STACKS})
    for stack in params.get(_STACKS, ()):
        for index, path in enumerate(stack.paths):
            _parent(placed, path)[path[-1]] = stack.matrices[index]
    return placed


def _parent(params: Params, path: Path) -> Params:
    for name in path[:-1]:
        params = params[name]
    return params
