"""The parameters that are matrices of a plain product, and what can be made of them: integers, or what the CPU's
kernels read. Everything else (norms, biases, experts, what is multiplied head by head) stays an array."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import jax
from flax import nnx

from isthmus.model.config import ModelConfig
from isthmus.model.layers import Linear
from isthmus.model.ops.cpu.packed import Packed, put, stack_like
from isthmus.model.ops.linear import Weight
from isthmus.model.ops.quantized import Quantized
from isthmus.model.transformer import Params, abstract_module

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


def replace_matrices(config: ModelConfig, params: Params, change: Callable[[Path, Weight, int], Weight | None]) -> None:
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


class Packing:
    """Lays matrices out for the CPU's kernels as they come, in any order and from any thread."""

    def __init__(self, config: ModelConfig, params: Params) -> None:
        """params: unstacked; arrays or their shapes."""
        alike: dict[tuple, list[Path]] = {}
        self._inputs = matrix_inputs(config)
        for path, inputs in self._inputs.items():
            weight = _parent(params, path)[path[-1]]
            if path != ("embedding",) or config.tie_embeddings or isinstance(weight, Quantized):  # else only looked up
                alike.setdefault(_layout(path, weight, inputs), []).append(path)
        self._paths = list(alike.values())
        self.places = {path: (n, index) for n, paths in enumerate(self._paths) for index, path in enumerate(paths)}
        """Of each matrix that is packed: which stack, and where in it"""
        self._stacks: list[Packed | None] = [None] * len(alike)
        self._one_at_a_time = Lock()  # each is packed by all threads of the kernels' own pool

    def put(self, path: Path, weight: Weight) -> Weight | None:
        """Packs what is a matrix; gives back what is none."""
        if path not in self.places:
            return weight
        assert not isinstance(weight, Packed), "packed already"
        number, index = self.places[path]
        transposed = path == ("embedding",) and not isinstance(weight, Quantized)
        with self._one_at_a_time:
            stack = self._stacks[number]
            if stack is None:
                stack = stack_like(len(self._paths[number]), weight, self._inputs[path], transposed=transposed)
            self._stacks[number] = jax.block_until_ready(put(stack, index, weight, transposed=transposed))
        return None

    def finish(self, params: Params) -> Params:
        """The packed parameters, in stacks; `place_matrices` is for where they are multiplied. params: the others, and
        None where `put` took a matrix."""
        stacks = []
        for stack, paths in zip(self._stacks, self._paths, strict=True):
            assert stack is not None, f"no matrix was put for {paths}"
            stacks.append(Stack(stack, tuple(paths)))
        return {**params, _STACKS: stacks}


def pack_params(config: ModelConfig, params: Params) -> Params:
    """Packs every matrix. params: unstacked; each matrix is taken out of them, so that its memory is free before the
    next needs some."""
    packing = Packing(config, params)
    for path in packing.places:
        parent = _parent(params, path)
        parent[path[-1]] = packing.put(path, parent[path[-1]])
    return packing.finish(params)


def _layout(path: Path, weight: Weight, inputs: int) -> tuple:
    """What matrices of one stack have in common."""
    if isinstance(weight, Quantized):
        return (weight.bits, weight.group, weight.rotated, weight.scales.dtype, inputs, weight.outputs)
    assert not isinstance(weight, Packed), "packed already"
    return (weight.dtype, inputs, weight.size, path == ("embedding",))


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
