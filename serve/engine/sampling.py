"""From a request's sampling to its draw: the row that a step's plan holds for each token drawn, and the program that
draws. A sampling option has its place in a plan and its effect here and nowhere else in the engine.

A draw depends on the row's logits, its parameters, its seed and its position, and on nothing else in the batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.sampling import Drawn, Filters, sample


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, with nothing left open; the defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """0 is greedy"""
    top_k: int = 0
    """0 is off"""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """64 bits, which decide the random numbers of a draw together with its position"""
    logprobs: int = -1
    """How many of the likeliest tokens to tell at each position, at most MOST_LOGPROBS, besides the log-probability of
    the one drawn; -1 tells nothing"""


MOST_LOGPROBS = 20
"""The OpenAI API has the same limit. Every step has room for so many."""

DRAW = np.dtype(
    [
        ("slot", np.int32),  # whose last token it becomes; max_sequences keeps it for nobody
        ("position", np.int32),  # in its sequence
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed_low", np.uint32),
        ("seed_high", np.uint32),
        ("logprobs", np.int32),
    ]
)
"""What decides a draw, 32 bits each, so that a plan's draws travel as one array of words."""


def draw_of(sampling: Sampling) -> np.ndarray:
    """DRAW[]: the row of a request, whose slot and position are still to be said. Raises OverflowError for a number
    that has no place in it."""
    row = np.zeros((), DRAW)
    fields = asdict(sampling)
    seed = fields.pop("seed")
    for name, value in {**fields, "seed_low": seed & 0xFFFFFFFF, "seed_high": seed >> 32}.items():
        row[name] = value
    return row


def words(draws: np.ndarray) -> np.ndarray:
    """int32[samples, words]: the same memory as DRAW[samples]."""
    return draws.view(np.int32).reshape(len(draws), -1)


def draw(
    logits: jax.Array, last_token: jax.Array, draws: jax.Array, vocab: int, implementation: str
) -> tuple[jax.Array, Drawn]:
    """The sampler's program: (last_token, drawn), from float32 logits [samples, ids].

    last_token: int32[max_sequences + 1], what each slot drew last; its last entry takes what is drawn for nobody.
    draws: `words` of DRAW. vocab, implementation: as in `isthmus.model.ops.sampling.sample`.
    """
    column = {
        name: jax.lax.bitcast_convert_type(draws[:, index], DRAW[name]) for index, name in enumerate(DRAW.names or ())
    }
    uniform = uniform_numbers(column["seed_low"], column["seed_high"], column["position"])
    filters = Filters(*(column[name] for name in Filters._fields))
    judged = column["logprobs"]
    drawn = sample(logits, filters, uniform, judged, vocab, MOST_LOGPROBS, implementation=implementation)
    return last_token.at[column["slot"]].set(drawn.token), drawn


def uniform_numbers(seed_low: jax.Array, seed_high: jax.Array, position: jax.Array) -> jax.Array:
    """float32[rows, 2], in [0, 1): the numbers that decide each row's draw (`isthmus.model.ops.sampling`).

    seed_low, seed_high: uint32[rows]; position: int32[rows], the token's in its sequence. They come from
    fold_in(fold_in(seed, 0), position), 0 being the sample's number within its request.
    """

    def row(low: jax.Array, high: jax.Array, at: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 0), at), (2,), jnp.float32)

    return jax.vmap(row)(seed_low, seed_high, position)
