"""The attention kernel against a float64 loop over tokens that knows nothing of it: what it computes, what it must
never read or write, and that a token's result is its own, to the bit."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.linalg import hadamard

from isthmus.model.ops.attention import Scoring
from isthmus.model.ops.paged_attention import paged_step
from isthmus.model.ops.paged_cache import PagedCache, PagedStep

pytestmark = pytest.mark.usefixtures("kernels")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "int8": np.dtype(np.int8)}
LAYERS = 3


@dataclass(frozen=True)
class Shape:
    """A kind of step; `ends` and `lengths` below make it ragged."""

    head_dim: int = 20
    group: int = 2
    kv_heads: int = 2
    page_size: int = 4
    dtype: str = "float32"
    cache: str = "float32"
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    shared: bool = False
    rows: int = 5
    blocks: int = 2
    block: int = 6
    longest: int = 70
    layer: int = 1

    @property
    def slots(self) -> int:
        return self.kv_heads * (1 if self.shared else 2)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.head_dim**-0.5, self.window, self.soft_cap)


@dataclass
class Case:
    """Arguments of a step, in numpy. Whatever no token of it may read is NaN."""

    shape: Shape
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray | None
    pages: np.ndarray
    scales: np.ndarray | None
    tables: np.ndarray
    positions: np.ndarray
    sinks: np.ndarray | None

    @property
    def pages_a_layer(self) -> int:
        return len(self.pages) // LAYERS

    @property
    def first(self) -> int:
        return self.shape.layer * self.pages_a_layer

    def sequence(self, token: int) -> int:
        shape = self.shape
        return token if token < shape.rows else shape.rows + (token - shape.rows) // shape.block

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        """(page, offset) in the cache."""
        return self.first + self.tables[sequence, position // self.shape.page_size], position % self.shape.page_size

    def vector(self, place: tuple[int, int], slot: int) -> np.ndarray:
        """float64[head_dim]."""
        kept = self.pages[place][slot].astype(np.float64)
        return kept if self.scales is None else turned(kept * self.scales[place][slot].repeat(64)[: len(kept)])


@dataclass
class Result:
    out: np.ndarray
    pages: np.ndarray
    scales: np.ndarray | None


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(DTYPES[dtype])


@functools.cache
def hadamards(head_dim: int) -> np.ndarray:
    """float64[head_dim, head_dim]: in blocks of 4 for 20 numbers, of 64 for 576."""
    block = next(size for size in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if head_dim % size == 0)
    return np.kron(np.eye(head_dim // block), hadamard(block)) / np.sqrt(block)


def turned(vectors: np.ndarray) -> np.ndarray:
    """float64[..., head_dim]: how vectors lie in an int8 cache, and back."""
    return vectors.astype(np.float64) @ hadamards(vectors.shape[-1])


def int32(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.int32)


def ragged_positions(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """int32[tokens]: rows anywhere, blocks from anywhere on, and padding in between."""
    rows = rng.integers(0, shape.longest, shape.rows)
    starts = rng.integers(0, shape.longest - shape.block + 1, shape.blocks)
    positions = np.concatenate([rows, (starts[:, None] + np.arange(shape.block)).reshape(-1)])
    return np.where(rng.random(len(positions)) < 0.15, -1, positions).astype(np.int32)


def make_case(shape: Shape, seed: int = 0, positions: np.ndarray | None = None) -> Case:
    rng = np.random.default_rng(seed)
    positions = ragged_positions(rng, shape) if positions is None else positions
    tokens, sequences = len(positions), shape.rows + shape.blocks
    width = -(-shape.longest // shape.page_size)
    pages_a_layer = sequences * width + 3
    # Page 0 is nobody's; the others go to the sequences in no order.
    tables = rng.permutation(np.arange(1, pages_a_layer))[: sequences * width].reshape(sequences, width)
    pages = normal(rng, "float32", LAYERS * pages_a_layer, shape.page_size, shape.slots, shape.head_dim)
    scales = None
    if shape.cache == "int8":
        scales = rng.uniform(0.005, 0.02, (*pages.shape[:3], -(-shape.head_dim // 64))).astype(np.float32)
        pages = rng.integers(-127, 128, pages.shape).astype(np.int8)
    case = Case(
        shape,
        normal(rng, shape.dtype, tokens, shape.kv_heads * shape.group, shape.head_dim),
        normal(rng, shape.dtype, tokens, shape.kv_heads, shape.head_dim),
        None if shape.shared else normal(rng, shape.dtype, tokens, shape.kv_heads, shape.head_dim),
        pages.astype(DTYPES[shape.cache]),
        scales,
        tables.astype(np.int32),
        positions,
        normal(rng, "float32", shape.kv_heads * shape.group) if shape.sinks else None,
    )
    forbid(case)
    return case


def forbid(case: Case) -> None:
    """NaN in every slot of the layer that holds no token before or of this step."""
    used = np.zeros(case.pages.shape[:2], bool)
    used[: case.first] = used[case.first + case.pages_a_layer :] = True
    for token, position in enumerate(case.positions):
        for before in range(position + 1):
            used[case.place(case.sequence(token), before)] = True
    if case.scales is not None:
        case.scales[~used] = np.nan
    else:
        case.pages[~used] = np.nan


def run(case: Case, kernel: bool = True) -> Result:
    cache = PagedCache(jnp.asarray(case.pages), None if case.scales is None else jnp.asarray(case.scales))
    step = PagedStep(case.shape.rows, jnp.asarray(case.tables), jnp.asarray(case.positions))
    k, v = jnp.asarray(case.k), None if case.v is None else jnp.asarray(case.v)
    sinks = None if case.sinks is None else jnp.asarray(case.sinks)
    first, implementation = jnp.int32(case.first), "cpu" if kernel else "reference"
    out, cache = paged_step(
        jnp.asarray(case.q), k, v, cache, first, step, case.shape.scoring, sinks, implementation=implementation
    )
    return Result(np.asarray(out), np.asarray(cache.pages), None if cache.scales is None else np.asarray(cache.scales))


def written(case: Case) -> Result:
    """The cache as it should be after the step, its `out` aside."""
    pages, scales = case.pages.copy(), None if case.scales is None else case.scales.copy()
    for token, position in enumerate(case.positions):
        if position < 0:
            continue
        page, offset = case.place(case.sequence(token), position)
        for head in range(case.shape.kv_heads):
            parts = [case.k[token, head]] if case.v is None else [case.k[token, head], case.v[token, head]]
            for part, vector in enumerate(parts):
                slot = head * len(parts) + part
                if scales is None:
                    pages[page, offset, slot] = vector.astype(pages.dtype)
                else:
                    kept = turned(vector)
                    for group, start in enumerate(range(0, len(kept), 64)):
                        numbers = kept[start : start + 64]
                        top = np.abs(numbers).max()
                        scales[page, offset, slot, group] = top / 127
                        pages[page, offset, slot, start : start + 64] = np.rint(numbers * 127 / (top or 1))
    return Result(np.zeros(0), pages, scales)


def one_token(case: Case, token: int) -> np.ndarray:
    """float64[heads, head_dim]: attention of one token over what `case.pages` holds."""
    shape, position = case.shape, case.positions[token]
    start = max(0, position - shape.window + 1) if shape.window else 0
    places = [case.place(case.sequence(token), at) for at in range(start, position + 1)]
    out = []
    for head in range(shape.kv_heads * shape.group):
        slot = head // shape.group * (1 if shape.shared else 2)
        keys = np.stack([case.vector(place, slot) for place in places])
        values = keys if shape.shared else np.stack([case.vector(place, slot + 1) for place in places])
        scores = keys @ case.q[token, head].astype(np.float64) * shape.scoring.scale
        if shape.soft_cap:
            scores = shape.soft_cap * np.tanh(scores / shape.soft_cap)
        sink = -np.inf if case.sinks is None else float(case.sinks[head])
        top = max(scores.max(), sink)
        weights = np.exp(scores - top)
        out.append(weights @ values / (weights.sum() + np.exp(sink - top)))
    return np.stack(out)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(bits(got), bits(want))


def assert_cache_right(case: Case, got: Result) -> None:
    """Every bit of the cache but what the step's tokens are written to is what it was."""
    want = written(case)
    if case.scales is None:
        assert_same_bits(got.pages, want.pages)
        return
    assert got.scales is not None and want.scales is not None
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)
    assert np.abs(got.pages.astype(int) - want.pages.astype(int)).max() <= 1
    mine = np.zeros(case.pages.shape[:2], bool)
    for token, position in enumerate(case.positions):
        if position >= 0:
            mine[case.place(case.sequence(token), position)] = True
    assert_same_bits(got.pages[~mine], case.pages[~mine])
    assert_same_bits(got.scales[~mine], case.scales[~mine])


def assert_right(case: Case, tolerance: float = 1e-5) -> None:
    got = run(case)
    assert_cache_right(case, got)
    after = dataclasses.replace(case, pages=got.pages, scales=got.scales)
    for token, position in enumerate(case.positions):
        if position < 0:
            assert not got.out[token].astype(np.float32).any()
            continue
        rtol = 2.0**-8 if case.shape.dtype == "bfloat16" else tolerance
        want = one_token(after, token)
        np.testing.assert_allclose(got.out[token].astype(np.float64), want, rtol=rtol, atol=tolerance)


SHAPES = {
    "plain": Shape(),
    "pages of one": Shape(page_size=1),
    "pages of sixteen": Shape(page_size=16, head_dim=64, group=3),
    "one head": Shape(kv_heads=1, group=1, head_dim=8),
    "group of eight": Shape(group=8, head_dim=64, kv_heads=1),
    "window of one": Shape(window=1),
    "window of five": Shape(window=5, page_size=16),
    "window of a chunk and one": Shape(window=33, head_dim=64, longest=200),
    "soft cap": Shape(soft_cap=2.0, group=3),
    "sinks": Shape(sinks=True, group=3),
    "all of it": Shape(window=33, soft_cap=3.0, sinks=True, group=3, longest=120),
    "latent": Shape(shared=True, kv_heads=1, group=3, head_dim=576, longest=40),
    "latent in int8": Shape(shared=True, kv_heads=1, group=8, head_dim=576, cache="int8", dtype="bfloat16", longest=40),
    "shared by two heads": Shape(shared=True, kv_heads=2, group=1),
    "bfloat16": Shape(dtype="bfloat16", cache="bfloat16", head_dim=128, page_size=16),
    "bfloat16 of odd width": Shape(dtype="bfloat16", cache="bfloat16", head_dim=41, group=3, window=33, longest=120),
    "bfloat16 with all of it": Shape(
        dtype="bfloat16", cache="bfloat16", head_dim=48, group=5, soft_cap=3.0, sinks=True, page_size=16
    ),
    "latent in bfloat16": Shape(
        shared=True, kv_heads=1, group=3, head_dim=72, dtype="bfloat16", cache="bfloat16", block=40
    ),
    "bfloat16 over float32": Shape(dtype="bfloat16", cache="float32"),
    "float32 over bfloat16": Shape(dtype="float32", cache="bfloat16", sinks=True),
    "int8": Shape(cache="int8", page_size=16),
    "int8 of 24": Shape(cache="int8", head_dim=24, group=3, sinks=True),
    "int8 of odd width": Shape(cache="int8", head_dim=41),
    "int8 of 96": Shape(cache="int8", head_dim=96, group=5, soft_cap=3.0, page_size=16),
    "int8 of 256": Shape(cache="int8", head_dim=256, kv_heads=1, group=4, window=33, longest=120),
    "bfloat16 over int8": Shape(cache="int8", dtype="bfloat16", head_dim=64, window=5),
    "only rows": Shape(rows=9, blocks=0, block=0),
    "only blocks": Shape(rows=0, blocks=3, block=11),
    "one row": Shape(rows=1, blocks=0, block=0),
    "one block of one": Shape(rows=0, blocks=1, block=1),
    "long block": Shape(rows=2, blocks=1, block=60, page_size=16),
    "long": Shape(rows=2, blocks=1, block=5, longest=700, page_size=16),
    "a divided block": Shape(rows=3, blocks=1, block=30, kv_heads=1, group=4, longest=150, page_size=16),
    "divided blocks": Shape(
        rows=8, blocks=1, block=32, kv_heads=3, group=3, head_dim=64, longest=200, dtype="bfloat16", cache="bfloat16"
    ),
    "a divided block of int8": Shape(
        rows=0, blocks=1, block=19, kv_heads=1, head_dim=64, cache="int8", window=33, longest=90
    ),
    "first layer": Shape(layer=0),
    "last layer": Shape(layer=LAYERS - 1),
}
shapes = pytest.mark.parametrize("name", SHAPES)
INDEPENDENT = (
    *("plain", "all of it", "latent", "window of five", "long block", "long"),
    *("bfloat16", "bfloat16 of odd width", "bfloat16 with all of it", "latent in bfloat16", "bfloat16 over int8"),
    *("int8 of 24", "int8 of 96", "latent in int8"),
    *("a divided block", "divided blocks", "a divided block of int8"),
)


@shapes
def test_attention_over_ragged_steps(name: str) -> None:
    """Each token against its own keys alone, in a cache that is NaN wherever no token of its sequence is."""
    for seed in range(2):
        assert_right(make_case(SHAPES[name], seed))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_every_position_around_a_page_and_a_chunk(page_size: int) -> None:
    """The last slot of a page, the first of the next, and the same of the kernel's own chunks of 32 keys."""
    positions = int32([0, 1, 3, 4, 5, 15, 16, 17, 30, 31, 32, 33, 47, 48, 62, 63, 64, 65])
    shape = Shape(page_size=page_size, rows=len(positions), blocks=0, block=0)
    for window in (0, 1, 32, 33):
        assert_right(make_case(dataclasses.replace(shape, window=window), 3, positions))


def test_padding_alone() -> None:
    """A step that is warmed up with nothing in it."""
    shape = Shape()
    assert_right(make_case(shape, 1, np.full(shape.rows + shape.blocks * shape.block, -1, np.int32)))


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_the_cache_is_what_the_reference_writes(cache: str) -> None:
    """Kernel and jnp may take turns on one cache: prefixes are shared between them."""
    case = make_case(Shape(cache=cache, dtype="bfloat16", layer=2), 4)
    case.pages, case.scales = np.nan_to_num(case.pages), None if case.scales is None else np.nan_to_num(case.scales)
    got, want = run(case), run(case, kernel=False)
    spare = case.first  # where the reference puts padding
    for mine, theirs in ((got.pages, want.pages), (got.scales, want.scales)):
        if mine is None or theirs is None:
            continue
        mine, theirs = np.delete(mine, spare, axis=0), np.delete(theirs, spare, axis=0)
        if cache == "int8":
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1 if mine.dtype == np.int8 else 0)
        else:
            assert_same_bits(mine, theirs)
    np.testing.assert_allclose(got.out.astype(np.float32), want.out.astype(np.float32), atol=0.03)


# ---- rows are independent


def part_of(case: Case, tokens: list[int]) -> Case:
    """A step of some of a case's tokens, each a row of its own."""
    sequences = [case.sequence(token) for token in tokens]
    return dataclasses.replace(
        case,
        shape=dataclasses.replace(case.shape, rows=len(tokens), blocks=0, block=0),
        q=case.q[tokens],
        k=case.k[tokens],
        v=None if case.v is None else case.v[tokens],
        tables=case.tables[sequences],
        positions=case.positions[tokens],
    )


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_token_alone_gives_the_same_bits(name: str) -> None:
    """Alone, in a block with others of its sequence, or between other requests."""
    case = make_case(SHAPES[name], 5)
    whole = run(case)
    after = dataclasses.replace(case, pages=whole.pages, scales=whole.scales)
    tokens = [int(token) for token in np.flatnonzero(case.positions >= 0)]
    for token in tokens[:: max(1, len(tokens) // 12)]:
        assert_same_bits(run(part_of(after, [token])).out[0], whole.out[token])
    some = [int(token) for token in np.random.default_rng(6).permutation(tokens)]
    assert_same_bits(run(part_of(after, some)).out, whole.out[some])


@pytest.mark.parametrize("name", ["plain", "all of it", "bfloat16 over int8"])
def test_a_prompt_in_pieces_gives_the_same_bits(name: str) -> None:
    """How much of a prompt fits into a step depends on who else is there; what it says must not."""
    shape = dataclasses.replace(SHAPES[name], rows=0, blocks=1, block=24)
    case = make_case(shape, 7, np.arange(20, 44, dtype=np.int32))
    whole = run(case)
    pages, scales = case.pages, case.scales
    for start, end in ((0, 1), (1, 8), (8, 19), (19, 24)):
        piece = dataclasses.replace(
            case,
            shape=dataclasses.replace(shape, block=end - start),
            q=case.q[start:end],
            k=case.k[start:end],
            v=None if case.v is None else case.v[start:end],
            positions=case.positions[start:end],
            pages=pages,
            scales=scales,
        )
        got = run(piece)
        assert_same_bits(got.out, whole.out[start:end])
        pages, scales = got.pages, got.scales
    assert_same_bits(pages, whole.pages)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_other_pages_give_the_same_bits(name: str) -> None:
    """Which pages a sequence is given is chance."""
    case = make_case(SHAPES[name], 8)
    whole = run(case)
    order = np.concatenate([[0], 1 + np.random.default_rng(9).permutation(case.pages_a_layer - 1)])  # old page → new
    layer = slice(case.first, case.first + case.pages_a_layer)
    moved = dataclasses.replace(case, tables=order[case.tables].astype(np.int32), pages=case.pages.copy())
    moved.pages[layer][order] = case.pages[layer]
    if case.scales is not None:
        moved.scales = case.scales.copy()
        moved.scales[layer][order] = case.scales[layer]
    got = run(moved)
    assert_same_bits(got.out, whole.out)
    assert_same_bits(got.pages[layer][order], whole.pages[layer])


@pytest.mark.parametrize("name", ["plain", "all of it", "bfloat16", "int8"])
def test_a_query_that_is_not_finite_keeps_it_to_itself(name: str) -> None:
    """One broken token: no other, of its own sequence or another, changes."""
    case = make_case(SHAPES[name], 10)
    whole = run(case)
    live = np.flatnonzero(case.positions >= 0)
    broken = [live[0], live[-2]]
    case.q[broken] = np.nan
    got = run(case)
    assert np.isnan(got.out[broken].astype(np.float32)).all()
    others = np.delete(np.arange(len(case.positions)), broken)
    assert_same_bits(got.out[others], whole.out[others])


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_a_key_that_is_not_finite_stays_in_its_sequence(cache: str) -> None:
    """One broken request: its own answer is visibly broken, everybody else's is what it was."""
    case = make_case(Shape(cache=cache, rows=4), 11, int32([9, 40, 3, 60, *range(10, 22)]))
    whole = run(case)
    case.k[1] = np.nan
    assert case.v is not None
    case.v[2] = np.inf
    got = run(case)
    assert not np.isfinite(got.out[[1, 2]]).any()
    others = np.delete(np.arange(len(case.positions)), [1, 2])
    assert_same_bits(got.out[others], whole.out[others])


# ---- the ends of the range


@pytest.mark.parametrize("name", ["plain", "sinks", "window of five", "latent"])
def test_scores_of_ten_thousand(name: str) -> None:
    """Exponentials of what no float32 holds: the largest score is taken off first."""
    case = make_case(SHAPES[name], 12)
    case.q *= 1e4
    assert_right(case, tolerance=0.02)
    case.q *= 1e30
    assert np.isfinite(run(case).out).all()


def test_keys_and_values_of_zero() -> None:
    """A vector without a largest number to be scaled by."""
    for cache in ("float32", "bfloat16", "int8"):
        case = make_case(Shape(cache=cache), 13)
        assert case.v is not None
        case.k[:], case.v[::2] = 0, 0
        assert_right(case)


# ---- calls that are wrong: an error, never a crash

RIGHT: dict[str, Any] = {
    "q": np.zeros((8, 4, 16), np.float32),
    "k": np.zeros((8, 2, 16), np.float32),
    "v": np.zeros((8, 2, 16), np.float32),
    "cache": np.zeros((6, 4, 4, 16), np.float32),
    "scales": np.zeros(0, np.float32),
    "tables": np.zeros((4, 3), np.int32),
    "positions": np.zeros(8, np.int32),
    "first": np.zeros((), np.int32),
    "sinks": np.zeros(0, np.float32),
}
IN_PLACE = {3: 1, 4: 2}


def call(
    out: tuple[tuple[int, ...], Any] = ((8, 4, 16), np.float32),
    aliases: dict[int, int] = IN_PLACE,
    rows: int = 2,
    shared: bool = False,
    **changed: np.ndarray,
) -> None:
    arguments = {**RIGHT, **changed}
    results = [out, *((arguments[name].shape, arguments[name].dtype) for name in ("cache", "scales"))]
    jax.block_until_ready(
        jax.ffi.ffi_call(
            "isthmus_paged_attention",
            tuple(jax.ShapeDtypeStruct(*result) for result in results),
            input_output_aliases=aliases,
        )(
            *map(jnp.asarray, arguments.values()),
            rows=np.int64(rows),
            scale=np.float32(1),
            soft_cap=np.float32(0),
            window=np.int64(0),
            shared=shared,
        )
    )


def test_the_right_call_is_right() -> None:
    """What the wrong calls below differ from."""
    call()


@pytest.mark.parametrize(
    "name, shape, dtype",
    [
        ("q", (8, 64), np.float32),
        ("q", (7, 4, 16), np.float32),
        ("q", (8, 5, 16), np.float32),
        ("q", (8, 4, 17), np.float32),
        ("q", (8, 4, 16), BFLOAT16),
        ("q", (8, 4, 16), np.int32),
        ("k", (8, 32), np.float32),
        ("k", (9, 2, 16), np.float32),
        ("k", (8, 3, 16), np.float32),
        ("k", (8, 0, 16), np.float32),
        ("k", (8, 2, 15), np.float32),
        ("k", (8, 2, 16), BFLOAT16),
        ("v", (0,), np.float32),
        ("v", (8, 1, 16), np.float32),
        ("v", (8, 2, 8), np.float32),
        ("v", (8, 2, 16), BFLOAT16),
        ("cache", (6, 4, 64), np.float32),
        ("cache", (0, 4, 4, 16), np.float32),
        ("cache", (6, 0, 4, 16), np.float32),
        ("cache", (6, 4, 2, 16), np.float32),
        ("cache", (6, 4, 4, 8), np.float32),
        ("cache", (6, 4, 4, 16), np.float16),
        ("cache", (6, 4, 4, 16), np.int8),
        ("tables", (12,), np.int32),
        ("tables", (1, 3), np.int32),
        ("tables", (2, 3), np.int32),
        ("tables", (6, 3), np.int32),
        ("tables", (4, 3), np.uint32),
        ("positions", (7,), np.int32),
        ("positions", (8,), np.float32),
        ("first", (2,), np.int32),
        ("first", (), np.float32),
        ("sinks", (3,), np.float32),
        ("sinks", (4,), BFLOAT16),
    ],
)
def test_a_wrong_argument_is_an_error(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """A mistake in the Python above must not read or write beyond an array."""
    with pytest.raises(jax.errors.JaxRuntimeError):
        call(**{name: np.zeros(shape, dtype)})


def test_other_wrong_calls_are_errors() -> None:
    """As above, for what is no array."""
    for rows in (-1, 5, 9):
        with pytest.raises(jax.errors.JaxRuntimeError, match="paged_attention: "):
            call(rows=rows)
    for out in (((8, 4, 8), np.float32), ((8, 4, 16), BFLOAT16)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="must be alike"):
            call(out=out)
    with pytest.raises(jax.errors.JaxRuntimeError, match="cache must be"):
        call(shared=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="written in place"):
        call(aliases={})
    integers = np.zeros((6, 4, 4, 16), np.int8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a scale for every 64"):
        call(cache=integers, scales=np.zeros((6, 4, 2), np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a scale for every 64"):
        call(cache=integers, scales=np.zeros((6, 4, 4), BFLOAT16))
    with pytest.raises(jax.errors.JaxRuntimeError, match="written in place"):
        call(cache=integers, scales=np.zeros((6, 4, 4), np.float32), aliases={3: 1})


@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1, -(2**31)])
def test_a_page_that_is_not_there_reads_and_writes_none_beyond_the_cache(page: int) -> None:
    """A table that is wrong costs its own sequence its answer, not the process."""
    call(tables=np.full((4, 3), page, np.int32), positions=int32([0, 3, 4, 11, 12, 100, 5, 6]))
