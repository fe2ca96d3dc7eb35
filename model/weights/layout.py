"""The two layouts of a network's parameters: an array a layer, or one for all layers of a run that are built alike.

Every function takes any tree with parameters in it, such as an optimizer's state, whose moments mirror them.
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
    """The layers that a parameter is of, and its path within a block; None for one that is outside the blocks."""
    if (match := _LAYERS.fullmatch(path)) is None:
        return None
    first = int(match[1])
    return range(first, int(match[2] or first) + 1), match[3]


def is_stacked(path: str) -> bool:
    """Whether the path is one of the stacked layout, with a leading axis of layers."""
    return (match := _LAYERS.fullmatch(path)) is not None and match[2] is not None


def is_params(node: Any) -> bool:
    """Whether a node of a tree is a network's parameters, or what mirrors them."""
    return isinstance(node, dict) and any(str(name).startswith("blocks/") for name in node)


def unstack(path: str, weight: Any) -> Iterator[tuple[str, Any]]:
    """The layers of one parameter with their paths; a parameter that isn't stacked as it is."""
    found = layers_of(path)
    if found is None or not is_stacked(path):
        yield path, weight
        return
    layers, rest = found
    for index, layer in enumerate(layers):
        yield f"blocks/{layer}/{rest}", jax.tree.map(lambda x, i=index: x[i], weight)


def unstack_params(tree: Any) -> Any:
    """`tree` with an array a layer in all parameters."""

    def convert(node: Any) -> Any:
        if not is_params(node):
            return node
        return dict(each for path, weight in node.items() for each in unstack(path, weight))

    return jax.tree.map(convert, tree, is_leaf=is_params)


def stack_params(tree: Any, runs: Iterable[range] | None = None) -> Any:
    """The inverse of `unstack_params`. Without `runs`, neighbours with the same arrays are a run; adapters need those
    of the network, whose layers may differ in their experts alone. A run without any layer in `tree` is left out."""
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
    """What is outside the blocks, and each layer's parameters by their paths within a block."""
    outside: Params = {}
    layers: dict[int, Params] = {}
    for path, weight in params.items():
        if (found := layers_of(path)) is None:
            outside[path] = weight
        else:
            layers.setdefault(found[0].start, {})[found[1]] = weight
    return outside, layers


def _alike(layers: dict[int, Params]) -> Iterator[range]:
    """Neighbours with the same arrays."""
    shapes = {layer: str(jax.tree.map(lambda x: (jnp.shape(x), x.dtype), layers[layer])) for layer in sorted(layers)}
    for _, group in groupby(enumerate(shapes), key=lambda each: (each[1] - each[0], shapes[each[1]])):
        run = [layer for _, layer in group]
        yield range(run[0], run[-1] + 1)
