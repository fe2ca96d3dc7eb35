"""A draw follows the distribution it was asked for, and depends on nothing else in the batch: the reference's and the
kernel's alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.model.ops.cpu import library
from isthmus.model.ops.sampling import BAD_ROW, BLOCK, FREE, Drawn, Filters, sample
from isthmus.serve.engine.sampling import uniform_numbers

Run = Callable[..., Any]
MOST = 8


@lru_cache
def program(implementation: str) -> Any:
    return jax.jit(partial(sample, implementation=implementation), static_argnums=(5, 6))


def draws(
    implementation: str,
    logits: np.ndarray,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    position: Any = 0,
    uniform: np.ndarray | None = None,
    vocab: int = 0,
    judged: Any = None,
    forced: Any = FREE,
) -> Any:
    """A token a row, or all of Drawn where `judged` is given; each parameter is one for all rows, or one a row. The
    numbers that decide a row come from its seed and position where they aren't given."""
    rows = len(logits)

    def each(value: Any, dtype: Any) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))

    if uniform is None:
        seeds = np.broadcast_to(np.asarray(seed, np.uint64), (rows,))
        low, high = (seeds & 0xFFFFFFFF).astype(np.uint32), (seeds >> np.uint64(32)).astype(np.uint32)
        uniform = np.asarray(uniform_numbers(jnp.asarray(low), jnp.asarray(high), each(position, np.int32)))
    filters = Filters(
        each(temperature, np.float32), each(top_k, np.int32), each(top_p, np.float32), each(min_p, np.float32)
    )
    told = each(-1 if judged is None else judged, np.int32)
    vocab = vocab or logits.shape[1]
    columns = filters, jnp.asarray(uniform), told, each(forced, np.int32)
    drawn = program(implementation)(jnp.asarray(logits, np.float32), *columns, vocab, MOST)
    whole = Drawn(*map(np.asarray, drawn))
    return whole.token if judged is None else whole


@pytest.fixture(params=["reference", "cpu"])
def run(request: pytest.FixtureRequest) -> Run:
    """`draws` by each implementation."""
    if request.param == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    return partial(draws, request.param)


# against the plain way, in float64


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, bool]:
    """Which tokens stay, the plain way, and whether rounding could decide it either way. logits: float32[vocab]."""
    keep = np.ones(len(logits), bool)
    ranked = np.sort(logits)[::-1]
    if top_k:
        keep &= logits >= ranked[min(top_k, len(logits)) - 1]
    close = False
    if top_p < 1:
        mass = np.where(keep, np.exp(logits.astype(np.float64)), 0)
        wanted = top_p * mass.sum()
        total = 0.0
        for value in np.unique(logits[keep])[::-1]:
            total += mass[logits == value].sum()
            close |= abs(total - wanted) < 1e-5 * mass.sum()
            if total >= wanted:
                keep &= logits >= value
                break
    if min_p:
        # min_p is a share of the likeliest token's probability, and the largest logit is 0.
        close |= bool(np.any(np.abs(logits - math.log(min_p)) < 1e-5))
        keep &= np.exp(logits.astype(np.float64)) >= min_p
    return keep, close


def inverted(weights: np.ndarray, uniform: np.ndarray) -> tuple[int, bool]:
    """The id that two numbers choose by weights float64[vocab], and whether rounding could choose another."""
    padded = np.pad(weights, (0, -len(weights) % BLOCK)).reshape(-1, BLOCK)
    block, close = picked(padded.sum(axis=1), uniform[0])
    token, close_within = picked(padded[block], uniform[1])
    return block * BLOCK + token, close or close_within


def picked(weights: np.ndarray, uniform: float) -> tuple[int, bool]:
    sums = np.cumsum(weights) / weights.sum()
    return int(np.searchsorted(sums, uniform, side="right")), bool(np.any(np.abs(sums - uniform) < 1e-5))


FILTERS = ["", "top_k", "top_p", "min_p", "top_k top_p", "top_k min_p", "top_p min_p", "top_k top_p min_p"]


@pytest.mark.parametrize("vocab", [1, 50, 64, 513, 5000])
@pytest.mark.parametrize("names", FILTERS, ids=lambda names: names or "none")
def test_a_draw_is_the_one_that_sorting_gives(run: Run, names: str, vocab: int) -> None:
    """A filter that keeps too much gives nonsense now and then; one that keeps too little repeats itself. A token in
    the wrong place would make another distribution."""
    rng = np.random.default_rng([vocab, len(names)])
    rows = 160
    logits = np.concatenate([random_logits(rng, rows // 4, vocab, spread) for spread in SPREADS])
    temperature = rng.uniform(0.3, 2, rows).astype(np.float32)
    ranks = rng.integers(0, 2, rows) * (vocab - rng.integers(0, 60, rows)) + rng.integers(0, 60, rows)
    top_k = np.maximum(ranks, 0).astype(np.int32) * ("top_k" in names)
    top_p = np.where(("top_p" in names) & (rng.random(rows) < 0.8), rng.uniform(0, 1, rows), 1).astype(np.float32)
    min_p = np.where(("min_p" in names) & (rng.random(rows) < 0.8), rng.uniform(0, 0.5, rows), 0).astype(np.float32)
    uniform = rng.random((rows, 2), np.float32)
    uniform[::20] = [0, 0]
    uniform[1::20] = [1 - 2**-24, 1 - 2**-24]
    uniform[2::20] = [0, 1 - 2**-24]
    got = run(logits, temperature, top_k, top_p, min_p, uniform=uniform)
    compared = 0
    for row in range(rows):
        scaled = (logits[row] - logits[row].max()) / temperature[row]
        keep, close = kept_by_sorting(scaled, int(top_k[row]), float(top_p[row]), float(min_p[row]))
        token, close_draw = inverted(np.where(keep, np.exp(scaled.astype(np.float64)), 0), uniform[row])
        assert keep[got[row]] or close, f"row {row}: a token that was filtered out"
        if not (close or close_draw):
            compared += 1
            assert got[row] == token, f"row {row}"
    assert compared > 0.7 * rows or vocab == 1


SPREADS = ("peaked", "flat", "ties", "holes")


def random_logits(rng: np.random.Generator, rows: int, vocab: int, spread: str = "peaked") -> np.ndarray:
    """float32[rows, vocab]. Real ones are peaked, random weights give flat ones, a mask makes holes."""
    logits = rng.standard_normal((rows, vocab)) * (0.3 if spread == "flat" else rng.uniform(0.5, 6, (rows, 1)))
    if spread == "ties":
        logits = np.round(logits * 2) / 2
    if spread == "holes":
        logits[:, 1:][rng.random((rows, vocab - 1)) < 0.9] = -np.inf
    return logits.astype(np.float32)


@pytest.mark.parametrize("top_p", [0.0, 1e-45, 1e-30, 1e-7])
def test_the_likeliest_token_always_stays(run: Run, top_p: float) -> None:
    """However small top_p is, something must be left to draw, and it can only be the likeliest."""
    logits = random_logits(np.random.default_rng(0), 8, 50)
    np.testing.assert_array_equal(run(logits, top_p=top_p, seed=np.arange(8)), logits.argmax(axis=1))


def test_min_p_of_one_keeps_the_likeliest(run: Run) -> None:
    """The other end of the range."""
    logits = random_logits(np.random.default_rng(0), 8, 50)
    np.testing.assert_array_equal(run(logits, min_p=1.0, seed=np.arange(8)), logits.argmax(axis=1))


def test_top_k_of_one_is_greedy(run: Run) -> None:
    """Often used for that."""
    logits = random_logits(np.random.default_rng(0), 64, 50)
    np.testing.assert_array_equal(run(logits, temperature=5.0, top_k=1, seed=np.arange(64)), logits.argmax(axis=1))


# the distribution

DRAWS = 20_000
LOGITS = np.array([2.0, 1.5, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.5, -np.inf, 0.25])


def chi_square(drawn: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic, in standard deviations of its own distribution."""
    expected = probabilities * len(drawn)
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0, "a token of probability 0 was drawn"
    possible = probabilities > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("over", ["seeds", "positions", "high seeds"])
def test_draws_follow_the_softmax(run: Run, temperature: float, over: str) -> None:
    """The text must come from the model's distribution, over requests and along one text alike."""
    count = np.arange(DRAWS)
    where: dict[str, Any] = {
        "seeds": {"seed": count, "position": 17},
        "positions": {"seed": 3, "position": count},
        "high seeds": {"seed": count.astype(np.uint64) << np.uint64(32)},
    }[over]
    drawn = run(np.tile(LOGITS, (DRAWS, 1)), temperature=temperature, **where)
    assert abs(chi_square(drawn, softmax(LOGITS / temperature))) < 4


def test_filtered_draws_follow_what_is_left(run: Run) -> None:
    """After filtering, the rest must keep its proportions. Temperature comes first."""
    drawn = run(np.tile(LOGITS, (DRAWS, 1)), temperature=0.8, top_k=6, top_p=0.9, min_p=0.1, seed=np.arange(DRAWS))
    scaled = LOGITS / 0.8 - (LOGITS / 0.8).max()
    keep, close = kept_by_sorting(scaled.astype(np.float32), 6, 0.9, 0.1)
    assert not close and 2 <= keep.sum() < 6
    assert abs(chi_square(drawn, softmax(np.where(keep, scaled, -np.inf)))) < 4


def test_neighbouring_draws_are_independent(run: Run) -> None:
    """The same noise at the next position, or for the next seed, would make texts that echo each other."""
    count = np.arange(DRAWS)
    for first, second in [
        ({"seed": count, "position": 5}, {"seed": count, "position": 6}),
        ({"seed": count, "position": 5}, {"seed": count + 1, "position": 5}),
        ({"seed": 7, "position": count}, {"seed": 8, "position": count}),
    ]:
        logits = np.zeros((DRAWS, 4))
        pairs = run(logits, **first) * 4 + run(logits, **second)
        assert abs(chi_square(pairs, np.full(16, 1 / 16))) < 4


# what is told about a draw


@pytest.mark.parametrize("vocab", [1, 5, 64, 700, 5000])
def test_log_probabilities_are_the_models_own(run: Run, vocab: int) -> None:
    """They are what evaluations sum: of the model's distribution, whatever temperature and filters drew from, to 1e-5;
    the likeliest come in order, and of equal ones the first."""
    rng = np.random.default_rng(vocab)
    logits = np.concatenate([random_logits(rng, 16, vocab + 3, spread) for spread in SPREADS])
    judged = np.arange(len(logits)) % (MOST + 2) - 1
    drawn = run(logits, 0.7, 3, 0.9, 0.01, seed=np.arange(64), vocab=vocab, judged=judged)
    alone = run(logits, 0.7, 3, 0.9, 0.01, seed=np.arange(64), vocab=vocab)
    np.testing.assert_array_equal(drawn.token, alone)
    wide = logits[:, :vocab].astype(np.float64)
    want = wide - np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    want -= wide.max(axis=1, keepdims=True)
    for row, count in enumerate(judged):
        own = want[row, drawn.token[row]] if count >= 0 else 0.0
        np.testing.assert_allclose(drawn.log_probability[row], own, atol=1e-5)
        told = max(0, min(count, vocab))
        order = np.argsort(-wide[row], kind="stable")[:told]
        np.testing.assert_array_equal(drawn.top_tokens[row, :told], order)
        np.testing.assert_allclose(drawn.top_log_probabilities[row, :told], want[row, order], atol=1e-5)
        assert (drawn.top_log_probabilities[row, told:] == -np.inf).all()


@pytest.mark.parametrize("vocab", [5, 700])
def test_a_forced_token_is_told_as_if_it_had_been_drawn(run: Run, vocab: int) -> None:
    """To the bit, whatever draws beside it; and a free row beside it is drawn as ever. A token that the vocabulary
    doesn't have, or logits that are no numbers, mustn't pass for a probability."""
    rng = np.random.default_rng(vocab)
    logits = random_logits(rng, 48, vocab + 3, "flat")
    free = run(logits, seed=np.arange(48), vocab=vocab, judged=3)
    forced = np.where(np.arange(48) % 3 == 0, FREE, free.token)
    again = run(logits, np.arange(48) % 2, 2, 0.5, 0.5, seed=np.arange(48), vocab=vocab, judged=3, forced=free.token)
    beside = run(logits, seed=np.arange(48), vocab=vocab, judged=3, forced=forced)
    for one, other, third in zip(free, again, beside, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, third)
    last = logits[:, :vocab].argmin(axis=1)
    own = logits[:, :vocab].astype(np.float64)
    want = own[np.arange(48), last] - np.log(np.exp(own).sum(axis=1))
    np.testing.assert_allclose(run(logits, 0.0, vocab=vocab, judged=0, forced=last).log_probability, want, atol=1e-5)
    broken = logits.copy()
    broken[0, 1], broken[1, 1], broken[2] = np.nan, np.inf, -np.inf
    got = run(broken, vocab=vocab, judged=3, forced=np.where(np.arange(48) == 3, vocab, 0))
    assert (got.token[:4] == BAD_ROW).all() and (got.token[4:] == 0).all()
    assert (got.log_probability[:4] == 0).all() and (got.top_log_probabilities[:4] == -np.inf).all()


@pytest.mark.usefixtures("kernels")
def test_the_kernels_log_probabilities_do_not_depend_on_the_batch() -> None:
    """Bit for bit: a policy's gradient divides by them. XLA, the reference, may sum a row in another order."""
    run = partial(draws, "cpu")
    logits = random_logits(np.random.default_rng(0), 9, 3000)
    together = run(logits, judged=MOST, seed=np.arange(9))
    for row in range(9):
        for whole, alone in zip(together, run(logits[row : row + 1], judged=MOST, seed=row), strict=True):
            np.testing.assert_array_equal(whole[row].view(np.int32), alone[0].view(np.int32))


# rows


def mixed_rows() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    rows = 16
    parameters = {
        "temperature": np.where(np.arange(rows) % 4 == 0, 0.0, rng.uniform(0.2, 2, rows)),
        "top_k": rng.integers(0, 20, rows) * (np.arange(rows) % 3 == 0),
        "top_p": np.where(np.arange(rows) % 2 == 0, rng.uniform(0.3, 1, rows), 1.0),
        "min_p": rng.uniform(0, 0.1, rows) * (np.arange(rows) % 5 == 0),
        "seed": rng.integers(0, 2**63, rows).astype(np.uint64),
        "position": rng.integers(0, 1000, rows),
    }
    return random_logits(rng, rows, 300), parameters


def test_a_draw_does_not_depend_on_its_neighbours(run: Run) -> None:
    """A seed promises the same text again, whoever else is being served and in whatever row."""
    logits, parameters = mixed_rows()
    together = run(logits, **parameters)
    for row in range(len(logits)):
        alone = run(logits[row : row + 1], **{name: value[row : row + 1] for name, value in parameters.items()})
        assert alone[0] == together[row]
    order = np.random.default_rng(0).permutation(len(logits))
    shuffled = run(logits[order], **{name: value[order] for name, value in parameters.items()})
    np.testing.assert_array_equal(shuffled, together[order])


def test_both_halves_of_the_seed_and_the_position_count(run: Run) -> None:
    """Two users with seeds that differ in one bit anywhere must get different texts."""
    logits = np.zeros((1, 100_000))
    seeds = [0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]
    assert len({int(run(logits, seed=np.uint64(seed))[0]) for seed in seeds}) == len(seeds)
    assert len({int(run(logits, position=position)[0]) for position in range(20)}) == 20


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_says_so_and_harms_no_other(run: Run, bad: float, temperature: float) -> None:
    """A broken prompt must end with an error of its own, not with a token, and not with everybody's."""
    logits, parameters = mixed_rows()
    parameters["temperature"] = np.full(len(logits), temperature)
    want = run(logits, **parameters)
    broken = logits.copy()
    broken[3, 17] = bad
    broken[5] = -np.inf
    got = run(broken, **parameters)
    assert got[3] == got[5] == BAD_ROW
    others = np.delete(np.arange(len(logits)), [3, 5])
    np.testing.assert_array_equal(got[others], want[others])


def test_temperature_zero_is_argmax_whatever_the_filters(run: Run) -> None:
    """Greedy is what tests and evaluations ask for."""
    logits, parameters = mixed_rows()
    parameters["temperature"] = np.zeros(len(logits))
    np.testing.assert_array_equal(run(logits, **parameters), logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 2e-38, 1e-37, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(run: Run, temperature: float) -> None:
    """Instead of 0 people send 0.000001 or less: dividing by it must not overflow into nonsense."""
    logits = 20 + random_logits(np.random.default_rng(0), 8, 50)
    drawn = run(logits, temperature=temperature, seed=np.arange(8))
    np.testing.assert_array_equal(drawn, logits.argmax(axis=1))


def test_ids_beyond_the_vocabulary_are_never_drawn(run: Run) -> None:
    """The embedding is padded to a round size; its last rows are no tokens."""
    logits = np.zeros((5000, 20))
    logits[:, 12:] = 5
    drawn = run(logits, temperature=3.0, top_k=np.arange(5000) % 25, seed=np.arange(5000), vocab=12)
    assert set(drawn.tolist()) == set(range(12))
    assert set(run(logits, temperature=0.0, vocab=12).tolist()) == {0}


@pytest.mark.parametrize(
    "shapes, vocab",
    [
        ({"top_k": (2,)}, 8),
        ({"uniform": (2, 2)}, 8),
        ({"uniform": (3, 1)}, 8),
        ({}, 9),
        ({}, 0),
        ({"drawn": (4,)}, 8),
        ({"judged": (1,)}, 8),
        ({"forced": (4,)}, 8),
        ({"log_probability": (2,)}, 8),
        ({"top_tokens": (3, 3)}, 8),
        ({"top_log_probabilities": (4, 4)}, 8),
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernels")
def test_a_wrong_call_of_the_kernel_is_an_error(shapes: dict[str, tuple[int, ...]], vocab: int) -> None:
    """A mistake in the Python above must not read or write beyond an array."""
    rows = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), (3,))
    arguments = {"logits": (3, 8), **rows, "uniform": (3, 2), "judged": (3,), "forced": (3,)}
    made = {name: jnp.ones(shapes.get(name, shape)) for name, shape in arguments.items()}
    made |= {name: made[name].astype(jnp.int32) for name in ("top_k", "judged", "forced")}
    results = {"drawn": (3,), "log_probability": (3,), "top_tokens": (3, 4), "top_log_probabilities": (3, 4)}
    types = (jnp.int32, jnp.float32) * 2
    call = jax.ffi.ffi_call(
        "isthmus_sample",
        tuple(
            jax.ShapeDtypeStruct(shapes.get(name, shape), dtype)
            for (name, shape), dtype in zip(results.items(), types, strict=True)
        ),
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="sampling:"):
        jax.block_until_ready(call(*made.values(), vocab=np.int64(vocab)))
