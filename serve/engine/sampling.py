"""From a request's sampling to its draw: the row that a step's plan holds for each token drawn, and the program that
draws. A sampling option has its place in a plan and its effect here and nowhere else in the engine.

A draw depends on the row's logits, its parameters, its seed and its position, and on nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.adjustments import Adjustments, words_for
from isthmus.model.ops.sampling import FREE, Drawn, Filters, sample


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
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that the sequence holds, and multiplies the others; 1 is off"""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was drawn"""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were drawn"""
    bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit), at most MOST_BIASED, of each id once"""
    allowed: frozenset[int] | None = None
    """The only ids that may be drawn; None is all"""
    bad: frozenset[int] = frozenset()
    """Ids that are never drawn"""
    min_tokens: int = 0
    """The number of tokens before which none is drawn that ends the sequence"""

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on the tokens before it, other than by the logits."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    @property
    def adjusts(self) -> bool:
        """Whether a draw sees other logits than the model's."""
        return self.looks_back or self.masks or bool(self.bias)

    @property
    def masks(self) -> bool:
        """Whether some ids may not be drawn."""
        return self.allowed is not None or bool(self.bad) or self.min_tokens > 0


MOST_LOGPROBS = 20
"""The OpenAI API has the same limit. Every step has room for so many."""
MOST_BIASED = 300
"""The OpenAI API has the same limit. Every step with an adjusted draw has room for so many."""

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
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("prompt", np.int32),  # tokens of the prompt
        ("forced", np.int32),  # the token that it is; FREE where it is drawn
    ]
)
"""What decides a draw, 32 bits each, so that a plan's draws travel as one array of words."""


def draw_of(sampling: Sampling, prompt: int = 0) -> np.ndarray:
    """DRAW[]: the row of a request with a prompt of so many tokens, whose slot and position are still to be said.
    Raises OverflowError for a number that has no place in it."""
    row = np.zeros((), DRAW)
    seed = sampling.seed
    more = {"seed_low": seed & 0xFFFFFFFF, "seed_high": seed >> 32, "prompt": prompt, "slot": 0, "position": 0}
    more["forced"] = FREE
    for name in DRAW.names or ():
        row[name] = more[name] if name in more else getattr(sampling, name)
    return row


def no_draws(count: int, nobody: int) -> np.ndarray:
    """DRAW[count]: draws that nobody asked for, by the slot `nobody`."""
    draws = np.zeros(count, DRAW)
    draws["slot"], draws["logprobs"], draws["repetition_penalty"], draws["forced"] = nobody, -1, 1, FREE
    return draws


class Bias(NamedTuple):
    """What is added to logits."""

    ids: np.ndarray
    """int32[rows, MOST_BIASED]; -1 where nothing is added"""
    values: np.ndarray
    """float32[rows, MOST_BIASED]"""

    @classmethod
    def none(cls, rows: int) -> Bias:
        return cls(np.full((rows, MOST_BIASED), -1, np.int32), np.zeros((rows, MOST_BIASED), np.float32))

    def set(self, row: int, bias: tuple[tuple[int, float], ...]) -> None:
        """Replaces a row. Raises OverflowError or ValueError for what has no place in it."""
        self.ids[row] = -1
        if bias:
            self.ids[row, : len(bias)], self.values[row, : len(bias)] = zip(*bias, strict=True)

    def rows(self, rows: list[int]) -> Bias:
        return Bias(self.ids[rows], self.values[rows])


def words(draws: np.ndarray) -> np.ndarray:
    """int32[samples, words]: the same memory as DRAW[samples]."""
    return draws.view(np.int32).reshape(len(draws), -1)


def columns(draws: jax.Array) -> dict[str, jax.Array]:
    """The fields of DRAW by their names, [samples] each, of its `words`."""
    return {
        name: jax.lax.bitcast_convert_type(draws[:, index], DRAW[name]) for index, name in enumerate(DRAW.names or ())
    }


def draw(
    logits: jax.Array, tokens: jax.Array, draws: jax.Array, adjusting: Adjusting | None, vocab: int, implementation: str
) -> tuple[jax.Array, Drawn]:
    """The sampler's program: (tokens, drawn), from float32 logits [samples, ids].

    tokens: as in `isthmus.serve.engine.state.State`. draws: `words` of DRAW. adjusting: where the draws see other
    logits than the model's. vocab, implementation: as in `isthmus.model.ops.sampling.sample`.
    """
    column = columns(draws)
    slot, position = column["slot"], column["position"]
    uniform = uniform_numbers(column["seed_low"], column["seed_high"], position)
    by = None
    if adjusting is not None:
        by = Adjustments(
            adjusting.bias_ids,
            adjusting.bias,
            column["repetition_penalty"],
            column["frequency_penalty"],
            column["presence_penalty"],
            tokens,
            slot,
            column["prompt"],
            position,
            adjusting.allowed,
        )
    drawn = draw_by(column, logits, uniform, by, vocab, implementation)
    return tokens.at[slot, position].set(drawn.token, mode="drop"), drawn


def draw_by(
    column: Mapping[str, jax.Array],
    logits: jax.Array,
    uniform: jax.Array,
    by: Adjustments | None,
    vocab: int,
    implementation: str,
) -> Drawn:
    """Draws as the `columns` of DRAW say, from float32 logits [samples, ids]; further arguments as in
    `isthmus.model.ops.sampling.sample`."""
    filters = Filters(*(column[name] for name in Filters._fields))
    judged, forced = column["logprobs"], column["forced"]
    return sample(logits, filters, uniform, judged, forced, vocab, MOST_LOGPROBS, by, implementation=implementation)


class Adjusting(NamedTuple):
    """What an adjusted draw takes beside its row of DRAW."""

    bias_ids: Any
    """int32[samples, MOST_BIASED]"""
    bias: Any
    """float32[samples, MOST_BIASED]"""
    allowed: Any
    """int32[samples, words]: bit i % 32 of word i // 32 says whether id i may be drawn"""


def abstract_adjusting(samples: int, ids: int) -> Adjusting:
    """The shapes and dtypes of an Adjusting."""
    biased = (samples, MOST_BIASED)
    return Adjusting(
        jax.ShapeDtypeStruct(biased, jnp.int32),
        jax.ShapeDtypeStruct(biased, jnp.float32),
        jax.ShapeDtypeStruct((samples, words_for(ids)), jnp.int32),
    )


def mask_of(ids: Iterable[int], size: int) -> np.ndarray:
    """int32[words]: a mask over `size` ids that has these. Raises IndexError for one beyond them."""
    bits = np.zeros(32 * words_for(size), bool)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view("<i4")


def uniform_numbers(seed_low: jax.Array, seed_high: jax.Array, position: jax.Array) -> jax.Array:
    """float32[rows, 2], in [0, 1): the numbers that decide each row's draw (`isthmus.model.ops.sampling`).

    seed_low, seed_high: uint32[rows]; position: int32[rows], the token's in its sequence. They come from
    fold_in(fold_in(seed, 0), position), 0 being the sample's number within its request.
    """

    def row(low: jax.Array, high: jax.Array, at: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 0), at), (2,), jnp.float32)

    return jax.vmap(row)(seed_low, seed_high, position)
