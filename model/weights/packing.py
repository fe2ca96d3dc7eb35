"""Packs matrices into the layout of the CPU kernels. Matrices of the same shape and format lie in one stack, outside
the blocks, because every array adds to the time that it takes to launch a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from threading import Lock
from typing import Any

import jax

from isthmus.model.ops.cpu.packed import Packed, put, stack_like
from isthmus.model.ops.linear import Weight
from isthmus.model.ops.quantized import Quantized
from isthmus.model.parameter import Role, Spec
from isthmus.model.transformer import Params


def is_packed(params: Params) -> bool:
    """Whether the matrices among `params` are already in the layout of the CPU kernels."""
    return any(isinstance(weight, Packed) for weight in params.values())


class Packing:
    """A transform of `isthmus.model.weights.load` that packs matrices for the CPU kernels. It takes them in any order
    and from any thread."""

    def __init__(self, specs: Mapping[str, Spec], params: Params) -> None:
        """params: in the unstacked layout, as arrays or as their shapes and dtypes."""
        self._specs = specs
        alike: dict[tuple, list[str]] = {}
        tied = "head" not in specs
        for path, spec in specs.items():
            # An embedding that isn't also the head is only looked up, never multiplied by.
            only_looked_up = spec.role is Role.EMBEDDING and not tied and not isinstance(params[path], Quantized)
            if spec.role.multiplies and not only_looked_up:
                alike.setdefault(_layout(spec, params[path]), []).append(path)
        self._names = [tuple(paths) for paths in alike.values()]
        self._places = {path: (n, index) for n, paths in enumerate(self._names) for index, path in enumerate(paths)}
        self._stacks: list[Packed | None] = [None] * len(alike)
        self._one_at_a_time = Lock()  # packing one matrix already uses all threads of the kernels' pool

    def __call__(self, path: str, weight: Weight) -> Weight | None:
        """Packs a matrix and returns None. Returns any other parameter unchanged."""
        if path not in self._places:
            return weight
        assert not isinstance(weight, Packed), "packed already"
        number, index = self._places[path]
        spec = self._specs[path]
        heads = spec.role in (Role.HEADS, Role.TURNED_HEADS)
        transposed = spec.role in (Role.EMBEDDING, Role.TURNED_HEADS) and not isinstance(weight, Quantized)
        with self._one_at_a_time:
            stack = self._stacks[number]
            array = weight.swapaxes(0, 1) if heads and isinstance(weight, jax.Array) else weight
            if stack is None:
                size, count = len(self._names[number]), spec.matrices
                stack = stack_like(size, array, spec.inputs, count=count, transposed=transposed)
            self._stacks[number] = jax.block_until_ready(put(stack, index, array, transposed=transposed))
        return None

    def finish(self, params: Params) -> Params:
        """Returns `params`, which are the parameters that were not packed, together with the stacks."""
        packed: dict[str, Any] = {}
        for stack, names in zip(self._stacks, self._names, strict=True):
            assert stack is not None, f"no matrix was put for {names}"
            packed[f"packed/{names[0]}"] = dataclasses.replace(stack, names=names)
        return {**params, **packed}


def pack_params(specs: Mapping[str, Spec], params: Params) -> Params:
    """Packs every matrix of `params`, which are in the unstacked layout. Each parameter is removed from `params` as it
    is packed, so that its memory is free before the next one is packed."""
    packing = Packing(specs, params)
    rest = {}
    for path in list(params):
        if (weight := packing(path, params.pop(path))) is not None:
            rest[path] = weight
    return packing.finish(rest)


def _layout(spec: Spec, weight: Weight) -> tuple:
    """The key that all matrices of one stack share: their shape and their format."""
    if isinstance(weight, Quantized):
        return (weight.bits, weight.group, weight.rotated, weight.scales.dtype, spec.inputs, weight.outputs)
    assert not isinstance(weight, Packed), "packed already"
    return (weight.dtype, spec.inputs, weight.size, spec.role)
