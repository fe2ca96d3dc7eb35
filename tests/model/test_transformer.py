"""The network computes what the papers say, however its layers are laid out."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.model.config import PRESETS, ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION, Execution, Remat
from isthmus.model.transformer import Params, abstract_params, bind
from isthmus.model.weights.layout import stack_params, unstack_params
from isthmus.train.step import packed_attention
from tests.model import reference
from tests.support import TINY, forward, on_host, random_params, relative_error

BASE = dataclasses.replace(TINY, kv_heads=4, tie_embeddings=True)
VARIANTS = {
    "base": BASE,
    "grouped queries": dataclasses.replace(BASE, kv_heads=2),
    "one key head": dataclasses.replace(BASE, kv_heads=1),
    "qk_norm": dataclasses.replace(BASE, qk_norm="head"),
    "attention_bias": dataclasses.replace(BASE, attention_bias=True),
    "mlp_bias": dataclasses.replace(BASE, mlp_bias=True),
    "untied head": dataclasses.replace(BASE, tie_embeddings=False),
    "all, with another theta and eps": dataclasses.replace(
        BASE,
        kv_heads=2,
        qk_norm="head",
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
        rope_theta=500.0,
        norm_eps=0.1,
    ),
}
SEQ = 24


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def packed(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of documents of `lengths`, one after the other."""
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    return positions, np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_papers(name: str, mesh: Mesh) -> None:
    """Weights from elsewhere would give other text if any part of the maths were ours alone."""
    config = VARIANTS[name]
    params = random_params(config, mesh)
    tokens = random_tokens(config, SEQ)
    positions, segments = packed([9, 15])
    got = forward(config, params, tokens[None], positions[None], segments[None])[0]
    want = reference.logits(config, on_host(params), tokens, positions, segments)
    assert np.abs(got - want).max() <= 1e-4
    assert np.abs(want).max() > 1, "the logits are too flat to tell right from wrong"


@pytest.mark.parametrize("name", ["qk_norm", "attention_bias", "mlp_bias", "untied head"])
def test_every_option_does_something(name: str, mesh: Mesh) -> None:
    """An option that is read and ignored would train another network than the one asked for."""
    config = VARIANTS[name]
    params = random_params(config, mesh)
    tokens = random_tokens(config, 1, SEQ)
    # The same parameters through the base network, which doesn't look at the option's own ones.
    difference = np.abs(forward(config, params, tokens) - forward(BASE, params, tokens))
    assert difference.max() > 0.1


def attended(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """float32[layers, seq, heads, head_dim]: what each layer's attention gives for tokens [1, seq]."""
    attend = packed_attention(np.zeros_like(tokens))

    def keep(layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, kept: jax.Array, *rest: Any) -> Any:
        out, _ = attend(layer, q, k, v, None, *rest)
        return out, kept.at[layer].set(out[0])

    empty = jnp.zeros((config.layers, tokens.shape[1], config.heads, config.head_dim))
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]

    def run(params: Params) -> jax.Array:
        kept: jax.Array = bind(config, DEFAULT_EXECUTION, params)(tokens, positions, keep, empty)[1]
        return kept

    return np.asarray(jax.jit(run)(params))


def test_grouped_queries_share_their_heads_in_order(mesh: Mesh) -> None:
    """Grouped-query attention is full attention with each key and value head repeated for its group of queries."""
    config = VARIANTS["grouped queries"]
    params = on_host(random_params(config, mesh))
    tokens = random_tokens(config, 1, SEQ)

    def repeat(path: str, leaf: np.ndarray) -> np.ndarray:
        return np.repeat(leaf, 2, axis=1) if "/key/" in path or "/value/" in path else leaf

    full = {path: repeat(path, leaf) for path, leaf in params.items()}
    same = forward(config, params, tokens), forward(BASE, full, tokens)
    assert relative_error(*same) <= 1e-6
    # Looked at in the layers too: the logits are of up to 20, and a product's width changes its rounding.
    got, want = attended(config, params, tokens), attended(BASE, full, tokens)
    assert np.abs(got - want).max() <= 5e-6
    other = attended(BASE, on_host(random_params(BASE, mesh)), tokens)
    assert np.abs(got - other).max(axis=(1, 2, 3)).min() > 0.1


def test_scanned_layers_give_the_unrolled_logits(tiny: ModelConfig, tiny_params: Params) -> None:
    """A model trained with scan_layers must serve unrolled as the same model."""
    tokens = random_tokens(tiny, 2, SEQ)
    unrolled = forward(tiny, tiny_params, tokens)
    scanned = forward(tiny, stack_params(tiny_params), tokens)
    assert np.abs(scanned - unrolled).max() <= 1e-6 * np.abs(unrolled).max()


def test_stack_and_unstack_are_inverses(tiny: ModelConfig, tiny_params: Params) -> None:
    """A checkpoint goes through both; either losing or reordering a layer would ruin it."""
    both = {"params": tiny_params, "moments": [tiny_params], "count": jnp.int32(3)}
    once = stack_params(both)
    shapes = jax.tree.map(lambda leaf: leaf.shape, once["params"])
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract_params(tiny, stacked=True))
    for layer in range(tiny.layers):
        want = tiny_params[f"blocks/{layer}/mlp/gate/kernel"]
        np.testing.assert_array_equal(once["moments"][0]["blocks/0-1/mlp/gate/kernel"][layer], want)
    jax.tree.map(np.testing.assert_array_equal, unstack_params(once), both)
    jax.tree.map(np.testing.assert_array_equal, stack_params(once), once)
    jax.tree.map(np.testing.assert_array_equal, unstack_params(both), both)


@pytest.mark.parametrize(
    "scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["unrolled", "scanned"]
)
def test_remat_changes_memory_and_not_gradients(scan_layers: bool, tiny: ModelConfig, tiny_params: Params) -> None:
    """Turning on rematerialization to fit a larger model must not train another model."""
    # As large as in training: with larger ones the loss would magnify rounding instead of mistakes.
    params = jax.tree.map(lambda x: 0.4 * x, tiny_params)
    params = stack_params(params) if scan_layers else params
    tokens = random_tokens(tiny, 2, SEQ)
    positions = np.tile(np.arange(SEQ, dtype=np.int32), (2, 1))
    segments = np.zeros_like(tokens)

    def loss(execution: Execution, params: Params) -> jax.Array:
        model = bind(tiny, execution, params)
        hidden, _ = model(tokens, positions, packed_attention(segments), None)
        return jnp.square(model.logits(hidden)).mean()

    def run(remat: Remat) -> Params:
        grad = jax.grad(partial(loss, Execution(scan_layers=scan_layers, remat=remat)))
        assert ("remat" in str(jax.make_jaxpr(grad)(params))) == (remat != "none")
        return on_host(jax.jit(grad)(params))

    want = run("none")
    assert relative_error(run("dots"), want) <= 1e-6
    assert relative_error(run("full"), want) <= 1e-6


def test_packed_documents_are_alone(tiny: ModelConfig, tiny_params: Params) -> None:
    """Documents share a row to fill it; what a model learns about one must not depend on its neighbours."""
    lengths = [7, 5, 12]
    positions, segments = packed(lengths)
    row = random_tokens(tiny, SEQ)
    together = forward(tiny, tiny_params, row[None], positions[None], segments[None])[0]
    start = 0
    for length in lengths:
        alone = forward(tiny, tiny_params, row[None, start : start + length])[0]
        assert np.abs(together[start : start + length] - alone).max() <= 1e-5
        start += length
    other = row.copy()
    other[:7] = (other[:7] + 1) % tiny.vocab_size
    changed = forward(tiny, tiny_params, other[None], positions[None], segments[None])[0]
    np.testing.assert_array_equal(changed[7:], together[7:])


def test_a_token_does_not_see_the_future(tiny: ModelConfig, tiny_params: Params) -> None:
    """Looking ahead makes the training loss wonderful and the served text nonsense."""
    tokens = random_tokens(tiny, 1, SEQ)
    later = tokens.copy()
    later[0, 10:] = (later[0, 10:] + 1) % tiny.vocab_size
    before, after = forward(tiny, tiny_params, tokens), forward(tiny, tiny_params, later)
    np.testing.assert_array_equal(before[0, :10], after[0, :10])
    assert np.abs(before[0, 10:] - after[0, 10:]).max() > 0.1


@pytest.mark.parametrize("name", [*VARIANTS, *PRESETS])
def test_parameter_count(name: str) -> None:
    """The count is printed, and MFU and the published tables stand on it."""
    config = VARIANTS.get(name) or PRESETS[name]
    config = dataclasses.replace(config, vocab_size=config.vocab_size or 4096)
    assert config.parameters == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def test_forward_flops_are_the_compilers(mesh: Mesh) -> None:
    """MFU divides by this formula: counting too many FLOPs would flatter it."""
    config = ModelConfig(
        vocab_size=512, dim=256, layers=2, heads=4, kv_heads=2, head_dim=64, mlp_dim=768, context_length=64
    )
    batch, seq = 2, 64
    ints = jax.ShapeDtypeStruct((batch, seq), jnp.int32)

    def run(params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        model = bind(config, DEFAULT_EXECUTION, params)
        hidden, _ = model(tokens, positions, packed_attention(segments), None)
        return model.logits(hidden)

    compiled = jax.jit(run).lower(abstract_params(config), ints, ints, ints).compile()
    counted = compiled.cost_analysis()["flops"]
    # This attention computes every pair and masks afterwards, so the formula is asked for all of them.
    assert config.forward_flops(batch * seq, batch * seq * seq) == pytest.approx(counted, rel=0.03)
    causal = config.forward_flops(batch * seq, batch * seq * (seq + 1) // 2)
    assert config.train_flops(batch, seq) == 3 * causal
