"""What changes logits before a draw: a bias for some ids, penalties for what a sequence holds already, and a mask of
what may come next."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Adjustments(NamedTuple):
    """They apply in this order: bias, repetition, frequency and presence together, then the mask; transformers and
    vLLM have the same order."""

    bias_ids: jax.Array
    """int32[rows, biased]: ids, none of them twice in a row; -1 is none"""
    bias: jax.Array
    """float32[rows, biased]: added to the logit of each of bias_ids"""
    repetition: jax.Array
    """float32[rows]: a positive logit of an id that the sequence holds, prompt included, is divided by it, and a
    negative one multiplied (Keskar et al. 2019, arXiv 1909.05858); 1 is off"""
    frequency: jax.Array
    """float32[rows]: subtracted as often as the id was drawn; 0 is off"""
    presence: jax.Array
    """float32[rows]: subtracted if the id was drawn; 0 is off"""
    tokens: jax.Array
    """int32[slots, context]: the sequences, each in its slot"""
    slot: jax.Array
    """int32[rows]: each row's slot"""
    prompt: jax.Array
    """int32[rows]: the tokens of its prompt; those from there on were drawn"""
    length: jax.Array
    """int32[rows]: its tokens"""
    allowed: jax.Array
    """int32[rows, words]: bit i % 32 of word i // 32 says whether id i may be drawn"""


def adjust(logits: jax.Array, by: Adjustments) -> jax.Array:
    """float32[rows, ids] as the draw sees them, from the model's own of the same shape."""
    rows, ids = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
    logits = logits.at[rows, jnp.where(by.bias_ids < 0, ids, by.bias_ids)].add(by.bias, mode="drop")
    history, at = by.tokens[by.slot], jnp.arange(by.tokens.shape[1])
    held = jnp.where(at < by.length[:, None], history, ids)
    drawn = jnp.where(at >= by.prompt[:, None], held, ids)
    seen = jnp.zeros(logits.shape, bool).at[rows, held].set(True, mode="drop")
    counts = jnp.zeros(logits.shape, jnp.float32).at[rows, drawn].add(1, mode="drop")
    factor = by.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits = logits - by.frequency[:, None] * counts - jnp.where(counts > 0, by.presence[:, None], 0)
    return jnp.where(bits(by.allowed, ids), logits, -jnp.inf)


def bits(words: jax.Array, count: int) -> jax.Array:
    """bool[rows, count]: the first bits of int32[rows, words], the lowest of each word first."""
    index = jnp.arange(count)
    return (words[:, index // 32] >> (index % 32)) & 1 == 1


def words_for(ids: int) -> int:
    """Words of a mask over so many ids."""
    return -(-ids // 32)
