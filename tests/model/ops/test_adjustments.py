"""Bias, penalties and masks change a draw as they are defined, and nothing else about it: the reference's and the
kernel's alike."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.model.ops.adjustments import Adjustments, adjust, words_for
from isthmus.model.ops.cpu import library
from isthmus.model.ops.sampling import BAD_ROW, FREE, Drawn, Filters, sample

ROWS, CONTEXT, SLOTS, BIASED, MOST = 24, 40, 9, 6, 4


def mask_of(allowed: np.ndarray) -> np.ndarray:
    """int32[rows, words] from bool[rows, ids]."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def random_adjustments(rng: np.random.Generator, ids: int, allowed: np.ndarray) -> Adjustments:
    """Some of each kind, in rows that have none of the others and in rows that have all."""
    bias_ids = np.full((ROWS, BIASED), -1, np.int32)
    for row in bias_ids[::2]:
        count = min(int(rng.integers(BIASED + 1)), ids)
        row[:count] = rng.choice(ids, count, replace=False)
    length = rng.integers(0, CONTEXT + 1, ROWS)
    some = lambda values, off: np.where(rng.random(ROWS) < 0.7, values, off).astype(np.float32)  # noqa: E731
    return Adjustments(
        bias_ids=bias_ids,
        bias=(rng.standard_normal((ROWS, BIASED)) * 4).astype(np.float32),
        repetition=some(rng.uniform(0.5, 2, ROWS), 1),
        frequency=some(rng.uniform(-1, 1, ROWS), 0),
        presence=some(rng.uniform(-2, 2, ROWS), 0),
        tokens=rng.integers(0, ids, (SLOTS, CONTEXT)).astype(np.int32),
        slot=rng.integers(0, SLOTS, ROWS).astype(np.int32),
        prompt=np.minimum(rng.integers(0, CONTEXT, ROWS), length).astype(np.int32),
        length=length.astype(np.int32),
        allowed=mask_of(allowed),
    )


def by_loops(logits: np.ndarray, by: Adjustments, allowed: np.ndarray) -> np.ndarray:
    """float64[rows, ids]: what the definitions say, one id at a time."""
    out = logits.astype(np.float64)
    for row in range(len(out)):
        for token, value in zip(by.bias_ids[row], by.bias[row], strict=True):
            if token >= 0:
                out[row, token] += value
        history = by.tokens[by.slot[row]][: by.length[row]].tolist()
        drawn = history[by.prompt[row] :]
        for token in set(history):
            value = out[row, token]
            out[row, token] = value / by.repetition[row] if value > 0 else value * by.repetition[row]
        for token in set(drawn):
            out[row, token] -= by.frequency[row] * drawn.count(token) + by.presence[row]
    return np.where(allowed, out, -np.inf)


@lru_cache
def program(implementation: str) -> Any:
    return jax.jit(partial(sample, implementation=implementation), static_argnums=(5, 6))


def drawn(
    implementation: str,
    logits: np.ndarray,
    by: Adjustments | None,
    judged: int = -1,
    forced: int | np.ndarray = FREE,
    **filters: Any,
) -> Drawn:
    if implementation == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    rows, ids = logits.shape
    each = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    columns = Filters(*(jnp.full(rows, v, jnp.int32 if k == "top_k" else jnp.float32) for k, v in each.items()))
    uniform = jnp.asarray(np.random.default_rng(7).random((rows, 2), np.float32))
    asked, given = jnp.full(rows, judged, jnp.int32), jnp.asarray(np.broadcast_to(np.int32(forced), rows))
    by = None if by is None else Adjustments(*map(jnp.asarray, by))
    whole = program(implementation)(jnp.asarray(logits), columns, uniform, asked, given, ids, MOST, by)
    return Drawn(*map(np.asarray, whole))


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "cpu"])
IDS = pytest.mark.parametrize("ids", [2, 33, 64, 500, 4097])


def case(ids: int, seed: int = 0) -> tuple[np.ndarray, Adjustments, np.ndarray]:
    rng = np.random.default_rng([ids, seed])
    logits = (rng.standard_normal((ROWS, ids)) * 3).astype(np.float32)
    share = rng.choice([0.02, 0.5, 1.0], (ROWS, 1))
    allowed = rng.random((ROWS, ids)) < share
    if ids > 200:  # whole cells of 64 without a token, as a grammar has them
        allowed[::3, 64:192] = False
    allowed[np.arange(ROWS), rng.integers(0, ids, ROWS)] = True
    return logits, random_adjustments(rng, ids, allowed), allowed


@IDS
def test_the_reference_is_what_the_definitions_say(ids: int) -> None:
    """A penalty with the wrong sign, or one that counts the prompt, makes another text of every request that asks for
    it."""
    logits, by, allowed = case(ids)
    assert by.allowed.shape[1] == words_for(ids)
    got = np.asarray(jax.jit(adjust)(jnp.asarray(logits), Adjustments(*map(jnp.asarray, by))))
    want = by_loops(logits, by, allowed)
    assert np.array_equal(np.isinf(got), np.isinf(want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
@IDS
def test_the_likeliest_is_that_of_what_the_draw_sees(implementation: str, ids: int) -> None:
    """Greedy text with penalties is the commonest use of them."""
    for seed in range(4):
        logits, by, allowed = case(ids, seed)
        want = by_loops(logits, by, allowed)
        got = drawn(implementation, logits, by).token
        best = want[np.arange(ROWS), got]
        assert allowed[np.arange(ROWS), got].all(), "a token that may not come"
        np.testing.assert_allclose(best, want.max(axis=1), rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 100, "top_p": 0.9, "min_p": 0.01}],
    ids=str,
)
def test_filters_are_of_what_the_draw_sees(implementation: str, filters: dict[str, Any]) -> None:
    """A draw from changed logits is the draw from logits that were so from the first."""
    for ids in (33, 4097):
        for seed in range(3):
            logits, by, allowed = case(ids, seed)
            changed = np.asarray(adjust(jnp.asarray(logits), Adjustments(*map(jnp.asarray, by))))
            got = drawn(implementation, logits, by, temperature=0.8, **filters)
            want = drawn(implementation, changed, None, temperature=0.8, **filters)
            assert (got.token == want.token).mean() > 0.99, "more than rounding can explain"
            assert allowed[np.arange(ROWS), got.token].all()


@IMPLEMENTATIONS
def test_what_is_told_is_the_models_own(implementation: str) -> None:
    """Log-probabilities are compared between requests, so they can't depend on a request's own penalties."""
    logits, by, _ = case(500)
    got, plain = drawn(implementation, logits, by, judged=3), drawn(implementation, logits, None, judged=3)
    np.testing.assert_array_equal(got.top_tokens, plain.top_tokens)
    np.testing.assert_array_equal(got.top_log_probabilities, plain.top_log_probabilities)
    own = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got.log_probability, own[np.arange(ROWS), got.token], atol=1e-5)


@IMPLEMENTATIONS
def test_a_row_that_asks_for_nothing_draws_the_same_bits(implementation: str) -> None:
    """Whether a neighbour has penalties decides which program runs; it must decide nothing else."""
    logits, by, _ = case(4097)
    off = Adjustments(
        np.full_like(by.bias_ids, -1), by.bias, np.ones_like(by.repetition), np.zeros_like(by.frequency),
        np.zeros_like(by.presence), by.tokens, by.slot, by.prompt, by.length, np.full_like(by.allowed, -1),
    )  # fmt: skip
    for temperature in (0.0, 0.9):
        got = drawn(implementation, logits, off, judged=2, temperature=temperature, top_p=0.9)
        plain = drawn(implementation, logits, None, judged=2, temperature=temperature, top_p=0.9)
        for one, other in zip(got, plain, strict=True):
            np.testing.assert_array_equal(one, other)


@IMPLEMENTATIONS
def test_a_row_without_an_allowed_token_is_told_from_others(implementation: str) -> None:
    """Anything else would be a token that the mask forbids."""
    logits, by, _ = case(500)
    by = by._replace(allowed=np.where(np.arange(ROWS)[:, None] == 3, 0, by.allowed))
    for temperature in (0.0, 1.0):
        token = drawn(implementation, logits, by, temperature=temperature).token
        assert token[3] == BAD_ROW and (np.delete(token, 3) >= 0).all()


@IMPLEMENTATIONS
def test_a_forced_token_looks_at_no_adjustments(implementation: str) -> None:
    """A prompt may hold what its answer must not: what is told about it is what is told without any option, to the bit,
    and its neighbours draw as ever."""
    logits, by, allowed = case(500)
    allowed[::2] = False
    by = by._replace(allowed=mask_of(allowed))
    given = np.where(np.arange(ROWS) % 2 == 0, 7, FREE)
    got = drawn(implementation, logits, by, judged=3, forced=given, temperature=0.9)
    plain = drawn(implementation, logits, None, judged=3, forced=given, temperature=0.9)
    free = drawn(implementation, logits, by, judged=3, temperature=0.9)
    for one, forced, other in zip(got, plain, free, strict=True):
        np.testing.assert_array_equal(one[::2], forced[::2])
        np.testing.assert_array_equal(one[1::2], other[1::2])
    assert (got.token[::2] == 7).all() and (free.token[::2] == BAD_ROW).all()
