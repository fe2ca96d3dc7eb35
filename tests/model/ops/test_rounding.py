"""Rounding to bfloat16 keeps on average what training moved a weight by, and is the same everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from isthmus.model.ops.rounding import narrowed
from isthmus.model.sharding import MeshShape, build_mesh

STEP = 2.0**-8
"""Between neighbours in bfloat16 from 0.5 to 1"""


def bits(array: object) -> np.ndarray:
    return np.asarray(array).view(np.uint16)


def by_hand(x: np.ndarray) -> np.ndarray:
    """uint16, the bits of the rounding as it is defined, in Python's own integers, number by number."""

    def of(value: int, place: int) -> int:
        h = (place * 0x9E3779B9 & 0xFFFFFFFF) ^ (value * 0x85EBCA6B & 0xFFFFFFFF)
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        h ^= h >> 16
        return (value + (h >> 16)) >> 16 & 0xFFFF

    flat = x.reshape(-1, x.shape[-2] * x.shape[-1])
    rows = [[of(int(value), place) for place, value in enumerate(row.view(np.uint32))] for row in flat]
    return np.array(rows, np.uint16).reshape(x.shape)


def test_the_rounding_is_the_one_that_is_written_down() -> None:
    """Another one would be another model: a checkpoint that was trained with it, served without."""
    x = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    np.testing.assert_array_equal(bits(narrowed(x, "bfloat16")), by_hand(x))


def test_what_bfloat16_holds_stays_as_it_is() -> None:
    """A published model of bfloat16 weights is served with its own weights; every pattern of bits, infinities too."""
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    got = np.asarray(narrowed(every.astype(np.float32), "bfloat16"))
    number = ~np.isnan(every.astype(np.float32))
    np.testing.assert_array_equal(bits(got)[number], bits(every)[number])
    assert np.isnan(got.astype(np.float32)[~number]).all()


def test_a_number_becomes_one_of_its_neighbours_as_often_as_it_is_near() -> None:
    """At 0.5 + f steps of half the size above, a share f goes up: 65,536 draws are within 4 standard deviations."""
    for share in (0.05, 0.3, 0.5, 0.9):
        x = np.full((256, 256), 0.5 + share * STEP, np.float32)
        up = np.asarray(narrowed(x, "bfloat16")).astype(np.float32) > 0.5
        exact = float((x[0, 0].astype(np.float64) - 0.5) / STEP)
        assert abs(up.mean() - exact) < 4 * np.sqrt(exact * (1 - exact) / x.size)
        values = np.unique(np.asarray(narrowed(x, "bfloat16")).astype(np.float32))
        np.testing.assert_array_equal(values, np.float32([0.5, 0.5 + STEP]))


def test_a_small_move_of_many_weights_is_kept() -> None:
    """A step of 2e-5 moves no weight of 0.1 to another number of bfloat16; what it moves a product by must still be
    there. The product of ones with the matrix is its sum: by hand, 2e-5 for each of a column's 4,096 weights."""
    before = np.random.default_rng(1).uniform(0.07, 0.12, (4096, 64)).astype(ml_dtypes.bfloat16).astype(np.float32)
    after = before + np.float32(2e-5)
    assert np.array_equal(after.astype(ml_dtypes.bfloat16), before.astype(ml_dtypes.bfloat16))
    moved = (np.asarray(narrowed(after, "bfloat16")).astype(np.float64) - before).sum(axis=0)
    assert abs(moved.mean() / (4096 * 2e-5) - 1) < 0.02


def test_a_stack_of_matrices_comes_out_as_each_alone_on_any_mesh() -> None:
    """Checkpoints are stacked and serving is not; a mesh splits both."""
    x = np.random.default_rng(2).standard_normal((4, 16, 24)).astype(np.float32)
    want = np.stack([bits(narrowed(matrix, "bfloat16")) for matrix in x])
    np.testing.assert_array_equal(bits(narrowed(x, "bfloat16")), want)
    sharding = NamedSharding(build_mesh(MeshShape(fsdp=4, tp=2)), PartitionSpec(None, "fsdp", "tp"))
    np.testing.assert_array_equal(bits(narrowed(jax.device_put(x, sharding), "bfloat16")), want)


def test_other_types_are_rounded_to_the_nearest() -> None:
    x = np.random.default_rng(3).standard_normal((8, 8)).astype(np.float32)
    np.testing.assert_array_equal(narrowed(x, "float16"), x.astype(np.float16))
    np.testing.assert_array_equal(narrowed(x, "float32"), x)
    np.testing.assert_array_equal(bits(narrowed(x[0], "bfloat16")), bits(jnp.asarray(x[0]).astype(jnp.bfloat16)))
