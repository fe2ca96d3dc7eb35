"""Chooses integers for a model's matrices by the activations that the matrices meet in some text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.execution import Execution
from isthmus.model.ops.linear import Observed
from isthmus.model.parameter import Role, Spec
from isthmus.model.transformer import Params, bind, parameter_specs
from isthmus.model.weights.gptq import quantize_by_moments
from isthmus.model.weights.layout import layers_of
from isthmus.model.weights.quantization import formats, quantize_params
from isthmus.train.step import packed_attention

MOMENTS_BYTES = 1 << 30
"""Most bytes of second moments that are summed at a time; for more of them the text goes through the model again"""


def quantize_on_text(
    config: ModelConfig,
    params: Params,
    rules: Sequence[str],
    texts: np.ndarray,
    on_progress: Callable[[float], None] = lambda matrices: None,
) -> None:
    """Turns matrices into integers in place, by the method of model/weights/gptq.py. Raises ConfigError if activations
    are not finite.

    Matrices whose moments fit into MOMENTS_BYTES are watched together; later ones meet the errors that the integers of
    these make. The embedding is rounded to the nearest, because it is also looked up. params: unstacked, in float32.
    texts: int32[windows, tokens]. on_progress(matrices): how many more are done; a half of each is counted as the text
    goes through.
    """
    specs, wanted = parameter_specs(config), formats(config, rules)
    for paths in _parts(specs, wanted):
        moments = _moments(config, params, paths, texts, on_progress)
        if broken := [path for path in paths if not jnp.isfinite(moments[path]).all()]:
            raise ConfigError(f"calibration: {broken[0]} meets activations that are not finite; use --calibration 0")
        for path in paths:
            bits, group, rotated, scales, _ = wanted[path]
            matrix = specs[path].as_matrix(params.pop(path))
            changed = quantize_by_moments(matrix, moments.pop(path), bits, group, rotated=rotated, scales=scales)
            params[path] = jax.block_until_ready(changed)
            on_progress(0.5)
    quantize_params(config, params, rules, lambda size: on_progress(1))


def _parts(specs: Mapping[str, Spec], wanted: Iterable[str]) -> Iterator[list[str]]:
    """Groups of matrices whose moments are summed together, in the order in which a token meets them."""
    part: list[str] = []
    for path in sorted((path for path in wanted if specs[path].role is not Role.EMBEDDING), key=_place):
        if part and sum(4 * specs[each].inputs ** 2 for each in (*part, path)) > MOMENTS_BYTES:
            yield part
            part = []
        part.append(path)
    if part:
        yield part


def _place(path: str) -> tuple[float, str]:
    found = layers_of(path)
    return (float("inf") if found is None else found[0].start, path)


def _moments(
    config: ModelConfig,
    params: Params,
    paths: Sequence[str],
    texts: np.ndarray,
    on_progress: Callable[[float], None],
) -> dict[str, jax.Array]:
    """The sum of x.T @ x over all tokens, float32[inputs, inputs] for each path. on_progress(matrices) gets half of
    their number in total."""

    def observed(moments: dict[str, jax.Array], params: Params, tokens: jax.Array) -> jax.Array:
        watched = {path: Observed(params[path], sums) for path, sums in moments.items()}
        model = bind(config, Execution(), {**params, **watched})
        attend = packed_attention(jnp.zeros((1, len(tokens)), jnp.int32))
        hidden, _ = model(tokens[None], jnp.arange(len(tokens))[None], attend, None)
        return model.logits(hidden).sum()

    @jax.jit
    def add(total: dict[str, jax.Array], params: Params, tokens: jax.Array) -> dict[str, jax.Array]:
        return jax.tree.map(jnp.add, total, jax.grad(observed)(total, params, tokens))

    specs = parameter_specs(config)
    total = {path: jnp.zeros((specs[path].inputs,) * 2, jnp.float32) for path in paths}
    for tokens in texts:
        total = jax.block_until_ready(add(total, params, tokens))
        on_progress(len(paths) / 2 / len(texts))
    return total
