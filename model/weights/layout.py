"""The two layouts of a network's parameters: unstacked, with one array per layer, and stacked, with one array for a run
of neighbouring layers that are built alike.

`stack_params` and `unstack_params` take any tree that contains parameters, such as the state of an optimizer, whose
moments have the same paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from isthmus.model.transformer import Params, run_name

_LAYERS = re.compile(r"blocks/(\d+)(?:-(\d+))?/(.*)")


def layers_of(path: str) -> tuple[range, str] | None:
    """The layers that a parameter belongs to, and its path within a block. None for a parameter outside the blocks."""
    if (match := _LAYERS.fullmatch(path)) is None:
        return None
    first = int(match[1])
    return range(first, int(match[2] or first) + 1), match[3]


def is_stacked(path: str) -> bool:
    """Whether a path belongs to the stacked layout, in which the array has a leading axis of layers."""
    return (match := _LAYERS.fullmatch(path)) is not None and match[2] is not None


def is_params(node: Any) -> bool:
    """Whether a node of a tree is a dict of a network's parameters, or of arrays that mirror them."""
    return isinstance(node, dict) and any(str(name).startswith("blocks/") for name in node)


def unstack(path: str, weight: Any) -> Iterator[tuple[str, Any]]:
    """Yields each layer of a parameter with its path. A parameter that isn't stacked is yielded as it is."""
    found = layers_of(path)
    if found is None or not is_stacked(path):
        yield path, weight
        return
    layers, rest = found
    for index, layer in enumerate(layers):
        yield f"blocks/{layer}/{rest}", jax.tree.map(lambda x, i=index: x[i], weight)


def unstack_params(tree: Any) -> Any:
    """Returns `tree` with all parameters in the unstacked layout."""

    def convert(node: Any) -> Any:
        if not is_params(node):
            return node
        return dict(each for path, weight in node.items() for each in unstack(path, weight))

    return jax.tree.map(convert, tree, is_leaf=is_params)


def stack_params(tree: Any, runs: Iterable[range] | None = None) -> Any:
    """The inverse of `unstack_params`.

    runs: the layers that form each run. By default, neighbours whose arrays are alike form a run. Adapters need the
    runs of their network, because its layers may differ in their experts alone. A run with no layer in `tree` is left
    out.
    """
    given = None if runs is None else list(runs)

    def convert(node: Any) -> Any:
        if not is_params(node) or any(map(is_stacked, node)):
            return node
        outside, layers = _by_layer(node)
        for run in _alike(layers) if given is None else given:
            present = [layers[layer] for layer in run if layer in layers]
            assert len(present) in (0, len(run)), (run, sorted(layers))
            for rest in present[0] if present else ():
                stacked = jax.tree.map(lambda *x: jnp.stack(x), *(layer[rest] for layer in present))
                outside[f"blocks/{run_name(run)}/{rest}"] = stacked
        return outside

    return jax.tree.map(convert, tree, is_leaf=is_params)


def _by_layer(params: Params) -> tuple[Params, dict[int, Params]]:
    """Returns the parameters outside the blocks, and the parameters of each layer by their paths within a block."""
    outside: Params = {}
    layers: dict[int, Params] = {}
    for path, weight in params.items():
        if (found := layers_of(path)) is None:
            outside[path] = weight
        else:
            layers.setdefault(found[0].start, {})[found[1]] = weight
    return outside, layers


def _alike(layers: dict[int, Params]) -> Iterator[range]:
    """The runs of neighbouring layers whose arrays have the same paths, shapes and dtypes."""
    shapes = {layer: str(jax.tree.map(lambda x: (jnp.shape(x), x.dtype), layers[layer])) for layer in sorted(layers)}
    for _, group in groupby(enumerate(shapes), key=lambda each: (each[1] - each[0], shapes[each[1]])):
        run = [layer for _, layer in group]
        yield range(run[0], run[-1] + 1)
