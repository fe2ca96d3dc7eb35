"""Integers chosen for what a model's matrices really meet: its own activations over some text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.ops.linear import Observed, Weight
from isthmus.model.transformer import Params, bind
from isthmus.model.weights.gptq import quantize_by_moments
from isthmus.model.weights.packing import Path, as_matrix, matrix_inputs, replace_matrices
from isthmus.model.weights.quantization import Format, formats, quantize_params
from isthmus.train.step import packed_attention

MOMENTS_BYTES = 1 << 30
"""Of second moments that are summed at a time: those of more matrices take the text once more"""


def quantize_on_text(
    config: ModelConfig,
    params: Params,
    rules: Sequence[str],
    texts: np.ndarray,
    tick: Callable[[float], None] = lambda matrices: None,
) -> None:
    """Turns matrices into integers as model/weights/gptq.py does, in place. params: unstacked, of a network that
    computes in float32 or bfloat16; texts: int32[windows, tokens]; tick(matrices) as they get done, half of each while
    the text goes through.

    Matrices whose moments fit into MOMENTS_BYTES are watched together; those behind then meet what is lost in these.
    The embedding is rounded to the nearest: it is looked up as well. Raises ConfigError where activations are not
    finite.
    """
    wanted = formats(config, rules)
    for paths in _parts(config, wanted):
        moments = _moments(config, params, paths, texts, tick)
        if broken := [path for path in paths if not jnp.isfinite(moments[path]).all()]:
            name = "/".join(broken[0])
            raise ConfigError(f"calibration: {name} meets activations that are not finite; --calibration 0 rounds")

        def change(path: Path, weight: Weight, inputs: int, moments: dict[Path, jax.Array] = moments) -> Weight:
            if path not in moments:
                return weight
            assert isinstance(weight, jax.Array)
            bits, group, rotated, scales, _ = wanted[path]
            matrix = as_matrix(path, weight, inputs)
            changed = quantize_by_moments(matrix, moments.pop(path), bits, group, rotated=rotated, scales=scales)
            jax.block_until_ready(changed)
            tick(0.5)
            return changed

        replace_matrices(config, params, change)
    quantize_params(config, params, rules, lambda size: tick(1))


def _parts(config: ModelConfig, wanted: dict[Path, Format]) -> Iterator[list[Path]]:
    """Matrices whose moments are summed at a time, in the order in which a token meets them."""
    inputs = matrix_inputs(config)
    in_order = sorted((path for path in wanted if path != ("embedding",)), key=_place)
    part: list[Path] = []
    for path in in_order:
        if part and sum(4 * inputs[each] ** 2 for each in (*part, path)) > MOMENTS_BYTES:
            yield part
            part = []
        part.append(path)
    if part:
        yield part


def _place(path: Path) -> tuple[float, Path]:
    return (int(path[1]) if path[0] == "blocks" else float("inf"), path)


def _moments(
    config: ModelConfig, params: Params, paths: Sequence[Path], texts: np.ndarray, tick: Callable[[float], None]
) -> dict[Path, jax.Array]:
    """float32[inputs, inputs] of each path: the sum over all tokens of x.T @ x. tick(matrices), half of them in all."""
    inputs = matrix_inputs(config)

    def observed(moments: dict[Path, jax.Array], params: Params, tokens: jax.Array) -> jax.Array:
        watched: Params = jax.tree.map(lambda leaf: leaf, params, is_leaf=lambda node: not isinstance(node, dict))

        def watch(path: Path, weight: Weight, inputs: int) -> Weight:
            return cast(Weight, Observed(cast(jax.Array, weight), moments[path])) if path in moments else weight

        replace_matrices(config, watched, watch)
        model = bind(config, watched)
        attend = packed_attention(jnp.zeros((1, len(tokens)), jnp.int32))
        hidden, _ = model(tokens[None], jnp.arange(len(tokens))[None], attend, None)
        return model.logits(hidden).sum()

    @jax.jit
    def add(total: dict[Path, jax.Array], params: Params, tokens: jax.Array) -> dict[Path, jax.Array]:
        return jax.tree.map(jnp.add, total, jax.grad(observed)(total, params, tokens))

    total = {path: jnp.zeros((inputs[path], inputs[path]), jnp.float32) for path in paths}
    for tokens in texts:
        total = jax.block_until_ready(add(total, params, tokens))
        tick(len(paths) / 2 / len(texts))
    return total
