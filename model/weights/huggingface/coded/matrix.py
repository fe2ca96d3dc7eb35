"""A matrix that a folder stores as codes and scales, which is decoded block by block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.weights.huggingface.coded.numbers import Numbers, exponents, unpack_rows
from isthmus.model.weights.huggingface.files import Stored, TensorFiles, View

BLOCK = 1 << 16
"""How many numbers are decoded at a time. As float32, they fit into a core's own cache."""

Box = tuple[slice, slice]


class Centred(NamedTuple):
    """The form of a matrix of integers whose zero is the same for all, in the middle of the integers' range."""

    bits: int
    group: int
    """The number of inputs that share a scale"""
    whole: bool
    """Whether all inputs share a scale"""


class Grid(ABC):
    """Codes with their zeros and scales, in rows and columns as they lie in memory."""

    shape: tuple[int, int]
    zero: np.ndarray | int
    """The number that is subtracted from each code; 0 where codes have a sign"""

    @property
    @abstractmethod
    def step(self) -> tuple[int, int]:
        """The numbers of rows and columns that are decoded together. Blocks begin at multiples of them."""

    @abstractmethod
    def codes(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns small integers or float32 [rows, columns], before the zeros are subtracted."""

    @abstractmethod
    def shift(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        """Subtracts the zeros from a block of codes, in place."""

    @abstractmethod
    def scale(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        """Multiplies a block by its scales, in place."""

    @property
    @abstractmethod
    def centred(self) -> Centred | None:
        """The form of the matrix where each number is a small integer times the scale of its output and group of
        inputs; None for any other matrix."""

    @abstractmethod
    def scales_by_group(self) -> np.ndarray:
        """The scales as float32[groups, outputs], for a matrix for which `centred` isn't None."""

    def decode(self, box: Box, dtype: np.dtype) -> np.ndarray:
        """Returns [rows, columns] in `dtype`, rounded to the nearest from float32. Only the part in `box` is decoded.
        The rest is memory that nothing has written to."""
        out = np.empty(self.shape, dtype)
        (top, bottom), (left, right) = (
            _aligned(part, step, size) for part, step, size in zip(box, self.step, self.shape, strict=True)
        )
        columns = slice(left, right)
        count = max(1, BLOCK // max(1, right - left) // self.step[0]) * self.step[0]
        for start in range(top, bottom, count):
            rows = slice(start, min(start + count, bottom))
            block = self.codes(rows, columns).astype(np.float32, copy=False)
            self.shift(block, rows, columns)
            self.scale(block, rows, columns)
            np.copyto(out[rows, columns], block, casting="unsafe")
        return out

    def integers(self) -> np.ndarray:
        """Returns all codes minus their zeros, int8[rows, columns]. They must fit into int8."""
        out = np.empty(self.shape, np.int8)
        whole = slice(0, self.shape[1])
        count = max(1, BLOCK // max(1, self.shape[1]) // self.step[0]) * self.step[0]
        for start in range(0, self.shape[0], count):
            rows = slice(start, min(start + count, self.shape[0]))
            block = self.codes(rows, whole).astype(np.int16)
            self.shift(block, rows, whole)
            np.copyto(out[rows], block, casting="unsafe")
        return out


def _aligned(part: slice, step: int, size: int) -> tuple[int, int]:
    """The beginning and the end of `part`, moved outwards to multiples of `step` within `size`."""
    return part.start // step * step, min(math.ceil(part.stop / step) * step, size)


@dataclass(frozen=True)
class OutputsFirst(Grid):
    """A matrix [outputs, inputs], as torch stores a Linear, with one scale for each of its tiles."""

    raw: np.ndarray
    numbers: Numbers
    shape: tuple[int, int]
    scales: np.ndarray
    """float32[tiles down, tiles across]"""
    tile: tuple[int, int]
    """The numbers of rows and columns that share a scale"""
    zero: np.ndarray | int = 0
    """float32 in the shape of the scales, or one number for all"""
    bits: int = 0
    """The bits of integers; 0 means that codes are floats"""

    @property
    def centred(self) -> Centred | None:
        centred = not isinstance(self.zero, np.ndarray) and self.zero in (0, 1 << (self.bits - 1) if self.bits else 0)
        if not self.bits or not centred or self.tile[0] not in (1, self.shape[0]):
            return None
        group = min(self.tile[1], self.shape[1])
        return Centred(self.bits, group, group == self.shape[1])

    def scales_by_group(self) -> np.ndarray:
        return np.broadcast_to(self.scales, (self.shape[0], self.scales.shape[1])).T

    @property
    def step(self) -> tuple[int, int]:
        across = self.tile[1] if self.tile[1] < self.shape[1] else 1
        return 1, math.lcm(self.numbers.values, across)

    def codes(self, rows: slice, columns: slice) -> np.ndarray:
        first, last = columns.start // self.numbers.values * self.numbers.items, self.numbers.items_for(columns.stop)
        found = self.numbers.decode(self.raw[rows, first:last])
        return found[:, : columns.stop - columns.start]

    def shift(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        if isinstance(self.zero, np.ndarray):
            self._by_tile(block, self.zero, rows, columns, np.subtract)
        elif self.zero:
            block -= block.dtype.type(self.zero)

    def scale(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        self._by_tile(block, self.scales, rows, columns, np.multiply)

    def _by_tile(self, block: np.ndarray, tiles: np.ndarray, rows: slice, columns: slice, change: np.ufunc) -> None:
        down, across = self.tile
        wanted = tiles[np.arange(rows.start, rows.stop) // down].astype(block.dtype, copy=False)
        wanted = wanted[:, columns.start // across :]
        whole = block.shape[1] // across
        inner = block[:, : whole * across].reshape(len(block), whole, across)
        change(inner, wanted[:, :whole, None], out=inner)
        if tail := block.shape[1] - whole * across:
            change(block[:, -tail:], wanted[:, whole : whole + 1], out=block[:, -tail:])


@dataclass(frozen=True)
class InputsFirst(Grid):
    """A matrix [inputs, outputs] with scales and zeros for groups of inputs."""

    raw: np.ndarray
    shape: tuple[int, int]
    scales: np.ndarray
    """float32[groups, outputs]"""
    group_of: np.ndarray
    """The index of the group of each input"""
    zero: np.ndarray | int
    """float32[groups, outputs], or one number for all"""
    bits: int
    numbers: Numbers | None = None
    """How codes are packed along a row; None where they are packed one below the other"""

    @property
    def centred(self) -> Centred | None:
        group = int((self.group_of == 0).sum())
        one_after_another = (self.group_of == np.arange(self.shape[0]) // max(1, group)).all()
        if isinstance(self.zero, np.ndarray) or self.zero != 1 << (self.bits - 1) or not one_after_another:
            return None
        return Centred(self.bits, group, group == self.shape[0])

    def scales_by_group(self) -> np.ndarray:
        return self.scales

    @property
    def step(self) -> tuple[int, int]:
        return (32 if self.numbers is None else 1), 1 if self.numbers is None else self.numbers.values

    def codes(self, rows: slice, columns: slice) -> np.ndarray:
        if self.numbers is not None:
            first, last = columns.start // self.numbers.values, self.numbers.items_for(columns.stop)
            return self.numbers.decode(self.raw[rows, first:last])[:, : columns.stop - columns.start]
        first, last = rows.start * self.bits // 32, math.ceil(rows.stop * self.bits / 32)
        return unpack_rows(self.raw[first:last, columns], self.bits)[: rows.stop - rows.start]

    def shift(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        if isinstance(self.zero, np.ndarray):
            block -= self.zero[self.group_of[rows], columns].astype(block.dtype, copy=False)
        else:
            block -= block.dtype.type(self.zero)

    def scale(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        block *= self.scales[self.group_of[rows], columns]


@dataclass(frozen=True)
class Coded:
    """A tensor that the files hold not under its own name, but as other tensors from which it is made."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    """The names of these other tensors"""
    nbytes: int
    """The size of these in bytes"""
    what: str
    """The kind in words, such as "GPTQ, 4 bits in groups of 128" """
    grid: Callable[[], Grid]
    """Reads the scales. Raises ConfigError naming a tensor with values that are not allowed"""
    transposed: bool = False
    """Whether the grid is the transpose of the tensor"""
    dtype: np.dtype = field(default=np.dtype("bfloat16"))
    """The dtype of the tensor where it is written as plain numbers"""

    def read(self, view: View, dtype: np.dtype) -> np.ndarray:
        """Returns view(the tensor) in `dtype`. Only the rows and columns that the view holds are decoded."""
        grid = self.grid()
        box = tuple(_span(view, self.shape, axis) for axis in range(2))
        if self.transposed:
            return view(grid.decode((box[1], box[0]), dtype).T)
        return view(grid.decode((box[0], box[1]), dtype))


def _span(view: View, shape: tuple[int, ...], axis: int) -> slice:
    """The range of indices along an axis that a view holds. It is read from the view of a tensor of indices, which
    takes no memory."""
    indices = np.arange(shape[axis])
    seen = view(np.broadcast_to(np.expand_dims(indices, tuple(i for i in range(len(shape)) if i != axis)), shape))
    seen = seen[tuple(slice(None) if stride else slice(0, 1) for stride in seen.strides)]
    return slice(int(seen.min()), int(seen.max()) + 1) if seen.size else slice(0, 0)


@dataclass(frozen=True)
class Found:
    """What a method finds in a folder's tensors."""

    coded: list[Coded]
    idle: Collection[str] = ()
    """The names of tensors that are no part of a weight, such as the scales of activations"""


Find = Callable[[TensorFiles], Found]
"""Finds a folder's matrices by a method and its settings."""


def plain_dtype(scales: np.dtype) -> np.dtype:
    """The dtype that a model was published in before it was quantized, as the dtype of its scales suggests."""
    return scales if scales == np.float16 else np.dtype("bfloat16")


def scales_of(files: TensorFiles, name: str, index: int | None = None) -> np.ndarray:
    """Returns a tensor of scales, or a slice of it, as float32. Raises ConfigError where a scale is not finite."""
    array = files.array(name)
    array = array if index is None else array[index]
    scales = exponents(array) if array.dtype.itemsize == 1 else array.astype(np.float32)
    if not np.isfinite(scales).all():
        raise ConfigError(f"{files.folder}: {name} holds scales that are not finite")
    return scales


def wanted(files: TensorFiles, name: str, owner: str, kinds: Collection[str]) -> Stored:
    """Returns a tensor that is part of a matrix. owner: the matrix, named in the error. Raises ConfigError where the
    tensor is missing, or its dtype is none of `kinds`."""
    if name not in files.tensors:
        raise ConfigError(f"{files.folder}: the tensor {name} is missing, which belongs to {owner}")
    stored = files.tensors[name]
    if stored.dtype.name not in kinds:
        raise ConfigError(f"{files.folder}: {name} is stored as {stored.dtype.name}, not as {' or '.join(kinds)}")
    return stored


def fits(files: TensorFiles, name: str, stored: Stored, shape: tuple[int, ...], why: str) -> None:
    """Raises ConfigError where a tensor has another shape than the other parts of its matrix give it. why: words that
    precede the right shape in the error."""
    if stored.shape != shape:
        raise ConfigError(f"{files.folder}: {name} has the shape {list(stored.shape)}, and {why} {list(shape)}")


def fits_tiles(files: TensorFiles, name: str, stored: Stored, tiled: tuple[int, int], why: str) -> None:
    """Raises ConfigError, as `fits` does, for a tensor that hasn't one number for each tile [down, across]. Where tiles
    lie along one axis only, axes of size 1 may be there or not, because files differ in this."""
    if 1 not in tiled or [size for size in stored.shape if size != 1] != [size for size in tiled if size != 1]:
        fits(files, name, stored, tiled, why)


def two_axes(files: TensorFiles, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape of a matrix. Raises ConfigError for a tensor that hasn't two axes, or is empty."""
    if len(shape) != 2 or min(shape) < 1:
        empty = ", none of them empty" if len(shape) == 2 else ""
        raise ConfigError(f"{files.folder}: {name} has the shape {list(shape)}, and two axes are expected{empty}")
    return shape[0], shape[1]


def group_of(files: TensorFiles, name: str, inputs: int, group: int, groups: int) -> np.ndarray:
    """Returns the group of each input. Groups lie one after the other, unless there is a tensor `name` that gives
    another order. Raises ConfigError for a group that doesn't exist."""
    if name not in files.tensors:
        return np.arange(inputs) // group
    found = files.array(name).astype(np.int64)
    if found.size and not (found.min() >= 0 and found.max() < groups):
        raise ConfigError(f"{files.folder}: {name} names groups that are not there: there are {groups}")
    return found
