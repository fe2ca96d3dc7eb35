"""Reads what the library compressed-tensors writes: integers and fp8, with a scheme for each group of modules."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.weights.huggingface.coded.floats import SCALES, tiles
from isthmus.model.weights.huggingface.coded.matrix import (
    Coded,
    Find,
    Found,
    OutputsFirst,
    fits,
    fits_tiles,
    group_of,
    plain_dtype,
    scales_of,
    two_axes,
    wanted,
)
from isthmus.model.weights.huggingface.coded.numbers import Numbers, packed
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.files import TensorFiles
from isthmus.model.weights.patterns import check_pattern

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
_IDLE = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
"""Suffixes of tensors about activations and the cache, which are not rounded here."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored."""

    targets: tuple[str, ...]
    """Names of modules, regular expressions over these after "re:", or names of classes"""
    bits: int
    kind: Literal["int", "float"]
    symmetric: bool
    strategy: str
    group: int
    """For the strategy group, the number of inputs that share a scale; otherwise 0"""
    block: tuple[int, ...]
    """For the strategy block, the numbers of outputs and inputs that share a scale; otherwise empty"""

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The numbers of rows and columns that share a scale. shape: that of the matrix."""
        if self.strategy == "tensor":
            return shape[0], shape[1]
        if self.strategy == "block":
            return self.block[0], self.block[1]
        return 1, self.group if self.strategy == "group" else shape[1]

    @property
    def what(self) -> str:
        many = f"groups of {self.group}" if self.strategy == "group" else f"one scale per {self.strategy}"
        return f"compressed-tensors, {'fp8' if self.kind == 'float' else f'int{self.bits}'}, {many}"


def compressed_tensors(fields: Fields) -> Find:
    """Reads the settings of the formats pack-quantized, int-quantized, float-quantized and naive-quantized
    (compressed_tensors, compressors/pack_quantized and compressors/naive_quantized)."""
    for name in ("ignore", "kv_cache_scheme", "global_compression_ratio"):
        fields.raw(name, None)
    fields.among("quantization_status", ("compressed", "frozen", None), None)
    fields.among("format", (*_FORMATS, "mixed-precision"))
    sparsity = fields.inner("sparsity_config")
    sparsity.among("format", ("dense", None), None)
    for name in sparsity:
        sparsity.raw(name)
    groups = fields.inner("config_groups")
    schemes = [scheme for name in groups if (scheme := _scheme(groups.inner(name))) is not None]
    return partial(_find, schemes=schemes)


def _scheme(fields: Fields) -> Scheme | None:
    """Reads the scheme of a group of modules; None for a group whose weights are plain numbers."""
    for name in ("input_activations", "output_activations"):
        fields.raw(name, None)
    fields.among("format", (*_FORMATS, None), None)
    targets = fields.raw("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise fields.error("targets", "must be a list of modules' names, classes and regular expressions")
    for target in targets:
        if target.startswith("re:") and (why := check_pattern(target.removeprefix("re:"))):
            raise fields.error("targets", f"is not supported: {target!r} {why}")
    if fields.raw("weights") is None:
        return None
    weights = fields.inner("weights")
    for name in ("dynamic", "observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype"):
        weights.raw(name, None)
    kind = weights.among("type", ("int", "float"), "int")
    strategy = weights.among("strategy", _STRATEGIES)
    block = weights.integers("block_structure", (), null=())
    if (strategy == "block") != bool(block) or (block and (len(block) != 2 or min(block) < 1)):
        raise weights.error("block_structure", "must be two whole numbers, at least 1, of the strategy block alone")
    scheme = Scheme(
        tuple(targets),
        weights.among("num_bits", (2, 3, 4, 5, 6, 8) if kind == "int" else (8,), 8),
        kind,
        weights.flag("symmetric", True),
        strategy,
        weights.integer("group_size", low=1) if strategy == "group" else 0,
        block,
    )
    weights.raw("group_size", None)
    weights.finish()
    fields.finish()
    return scheme


def _scheme_of(files: TensorFiles, module: str, schemes: list[Scheme]) -> Scheme:
    """Returns the scheme that names a module best: by its name, then by a pattern, then by its class
    (compressed_tensors, utils/match.py: match_targets). A module with codes is a Linear or the embedding. Raises
    ConfigError where no scheme does."""
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    tests = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target.removeprefix("re:"), module),
        lambda target: target == kind,
    )
    found = (scheme for test in tests for scheme in schemes if any(test(target) for target in scheme.targets))
    scheme = next(found, None)
    if scheme is None:
        raise ConfigError(f"{files.folder}: {module} is quantized, and no group in config.json's "
                          "quantization_config.config_groups names it")  # fmt: skip
    return scheme


def _find(files: TensorFiles, schemes: list[Scheme]) -> Found:
    coded = []
    for name, stored in sorted(files.tensors.items()):
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            coded.append(_packed(files, module, _scheme_of(files, module, schemes)))
        elif name.endswith(".weight") and stored.dtype.itemsize == 1:
            module = name.removesuffix(".weight")
            coded.append(_whole(files, module, _scheme_of(files, module, schemes)))
    return Found(coded, {name for name in files.tensors if name.endswith(_IDLE)})


def _whole(files: TensorFiles, module: str, scheme: Scheme) -> Coded:
    """A matrix in which each number has a byte of its own."""
    name = f"{module}.weight"
    stored = wanted(files, name, name, ("int8" if scheme.kind == "int" else "float8_e4m3fn",))
    scale = _scale(files, module, name, stored.shape, scheme)
    if scheme.kind == "float":
        zeros = f"{module}.weight_zero_point"
        if zeros in files.tensors and files.array(zeros).view(np.uint8).any():
            raise ConfigError(f"{files.folder}: {zeros} must be 0: floats have no zero point")
        parts = (name, scale, *(part for part in (zeros,) if part in files.tensors))
        return tiles(files, name, parts, stored.shape, scheme.what, scale, scheme.tile(stored.shape))
    return _integers(files, module, name, stored.shape, scheme, scale, ())


def _packed(files: TensorFiles, module: str, scheme: Scheme) -> Coded:
    """A matrix whose integers are packed in words."""
    name = f"{module}.weight_packed"
    words = wanted(files, name, name, ("int32",))
    if scheme.kind != "int":
        raise ConfigError(f"{files.folder}: {name}: floats of {scheme.bits} bits in words are not supported")
    wanted(files, f"{module}.weight_shape", name, ("int64", "int32"))
    sizes = tuple(int(size) for size in files.array(f"{module}.weight_shape").reshape(-1))
    if len(sizes) != 2 or min(sizes) < 1:
        raise ConfigError(f"{files.folder}: {module}.weight_shape is {list(sizes)}, and two sizes are expected")
    fits(files, name, words, (sizes[0], math.ceil(sizes[1] * scheme.bits / 32)), "weight_shape makes it")
    scale = _scale(files, module, name, sizes, scheme)
    return _integers(files, module, name, sizes, scheme, scale, (f"{module}.weight_shape",))


def _scale(files: TensorFiles, module: str, owner: str, shape: tuple[int, ...], scheme: Scheme) -> str:
    """Returns the name of a matrix's scales. Raises ConfigError where they are missing or have another shape than the
    scheme gives them."""
    name = f"{module}.weight_scale"
    stored = wanted(files, name, owner, SCALES)
    tiled = _tiles(two_axes(files, owner, shape), scheme)
    fits_tiles(files, name, stored, tiled, f"config.json's {scheme.strategy} scales make it")
    return name


def _tiles(shape: tuple[int, ...], scheme: Scheme) -> tuple[int, int]:
    """The numbers of tiles down and across the matrix."""
    down, across = (math.ceil(size / part) for size, part in zip(shape, scheme.tile(shape), strict=True))
    return down, across


def _integers(
    files: TensorFiles,
    module: str,
    name: str,
    shape: tuple[int, ...],
    scheme: Scheme,
    scale: str,
    others: tuple[str, ...],
) -> Coded:
    zeros, order = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    in_words, tiled = name.endswith("_packed"), _tiles(shape, scheme)
    if not scheme.symmetric:
        wanted(files, zeros, name, ("int32", "int8"))
    if zeros in files.tensors:
        _check_zeros(files, zeros, tiled, scheme.bits)
    if order in files.tensors:
        fits(files, order, wanted(files, order, name, ("int32", "int64")), (shape[1],), "its inputs make it")
    parts = (name, scale, *others, *(part for part in (zeros, order) if part in files.tensors))
    kept = files.tensors[scale].dtype

    def grid() -> OutputsFirst:
        scales = scales_of(files, scale).reshape(tiled)
        half = 1 << (scheme.bits - 1) if in_words else 0
        zero = _zeros(files, zeros, tiled, scheme.bits, half) if zeros in files.tensors else half
        tile = scheme.tile(shape)
        groups = group_of(files, order, shape[1], tile[1], tiled[1])
        if (groups != np.arange(shape[1]) // tile[1]).any():
            scales, tile = scales[:, groups], (tile[0], 1)
            zero = zero if isinstance(zero, int) else zero[:, groups]
        numbers = packed(scheme.bits) if in_words else _in_bytes(files, name, scheme.bits)
        raw = files.array(name)
        return OutputsFirst(raw, numbers, (shape[0], shape[1]), scales, tile, zero, scheme.bits)

    size = sum(files.tensors[part].nbytes for part in parts)
    return Coded(f"{module}.weight", shape, parts, size, scheme.what, grid, dtype=plain_dtype(kept))


def _in_bytes(files: TensorFiles, name: str, bits: int) -> Numbers:
    """Integers with a sign, one per byte."""
    return Numbers(1, 1, lambda raw: _in_range(files, name, raw, bits))


def _in_range(files: TensorFiles, name: str, integers: np.ndarray, bits: int) -> np.ndarray:
    """Returns the same integers. Raises ConfigError where one doesn't fit into so many bits."""
    half = 1 << (bits - 1)
    if bits < 8 and integers.size and not (integers.min() >= -half and integers.max() < half):
        raise ConfigError(f"{files.folder}: {name} holds integers outside {-half}..{half - 1}, which {bits} bits are; "
                          "damaged")  # fmt: skip
    return integers


def _check_zeros(files: TensorFiles, name: str, tiled: tuple[int, int], bits: int) -> None:
    """Raises ConfigError where zeros have another shape than the scales give them. They are stored one per byte, or in
    words one below the other."""
    stored = wanted(files, name, name, ("int32", "int8"))
    in_words = (math.ceil(tiled[0] * bits / 32), tiled[1])
    if stored.dtype == np.int32:
        fits(files, name, stored, in_words, "its scales make it")
    else:
        fits_tiles(files, name, stored, tiled, "its scales make it")


def _zeros(files: TensorFiles, name: str, tiled: tuple[int, int], bits: int, half: int) -> np.ndarray | int:
    """Returns the zeros, float32 in the shape of the scales. half: the number that was added to codes and zeros that
    are stored without a sign."""
    array = files.array(name)
    if array.dtype == np.int8:
        return (_in_range(files, name, array, bits).reshape(tiled) + np.float32(half)).astype(np.float32)
    unsigned = packed(bits).decode(np.ascontiguousarray(array.T)).T[: tiled[0]]
    return np.ascontiguousarray(unsigned, np.float32)
