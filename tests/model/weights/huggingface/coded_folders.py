"""Small folders whose matrices are kept as codes and scales, of every kind, and what they stand for: plain loops over
the stored tensors, written from the formats' definitions, number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.model.transformer import parameter_specs
from isthmus.model.weights.huggingface.families import read_config
from isthmus.model.weights.huggingface.files import SINGLE, TensorFiles
from isthmus.model.weights.huggingface.load import leaves_of, parts_of
from tests.model.weights.huggingface.folders import write_folder, write_tensors

Tensors = dict[str, np.ndarray]
Rng = np.random.Generator


@dataclass(frozen=True)
class Kind:
    """A way to keep a matrix."""

    config: dict[str, Any]
    """quantization_config"""
    make: Callable[[Rng, str, int, int], Tensors]
    """Random tensors of a module's matrix [outputs, inputs], by their names behind the module's"""
    meant: Callable[[Tensors, int, int], np.ndarray]
    """The matrix that they stand for, float32"""


def bits_of(words: np.ndarray, index: int, bits: int) -> int:
    """The unsigned number at `index` of those that lie one after the other in int32 words, the lowest bits first."""
    whole = int.from_bytes(np.ascontiguousarray(words).tobytes(), "little")
    return (whole >> (index * bits)) & ((1 << bits) - 1)


def in_words(numbers: list[int], bits: int) -> np.ndarray:
    """The inverse: int32 words of so many numbers as fill them."""
    whole = sum(number << at * bits for at, number in enumerate(numbers))
    return np.frombuffer(whole.to_bytes(len(numbers) * bits // 8, "little"), np.int32)


def words(rng: Rng, *shape: int) -> np.ndarray:
    return rng.integers(-(1 << 31), 1 << 31, shape).astype(np.int32)


def scales(rng: Rng, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    return rng.uniform(0.001, 0.01, shape).astype(dtype)


def by_number(outputs: int, inputs: int, number: Callable[[int, int], np.float32]) -> np.ndarray:
    return np.array([[number(o, i) for i in range(inputs)] for o in range(outputs)], np.float32)


def times(code: float, scale: Any) -> np.float32:
    return np.float32(code) * np.float32(scale)


# GPTQ: qweight packs a column's inputs, qzeros a group's outputs; w = (code - zero) * scale.


def gptq(bits: int, group: int, *, symmetric: bool = False, order: bool = False, v2: bool = False, **more: Any) -> Kind:
    def make(rng: Rng, module: str, outputs: int, inputs: int) -> Tensors:
        size = inputs if group < 0 else group
        groups = -(-inputs // size)
        zeros = words(rng, groups, outputs * bits // 32)
        if not v2:  # as it's written for zeros of 1 and more: none is kept as all ones, which adding one would carry on
            kept = (1 << (bits - 1)) - 1 if symmetric else 1
            zeros = np.tile(in_words([kept] * 32, bits), (groups, outputs // 32 + 1))[:, : outputs * bits // 32]
        tensors = {
            "qweight": words(rng, -(-inputs * bits // 32), outputs),
            "qzeros": zeros,
            "scales": scales(rng, groups, outputs),
            "g_idx": (np.arange(inputs) // size).astype(np.int32),
        }
        if order:
            tensors["g_idx"] = rng.permutation(tensors["g_idx"])
        return tensors

    def meant(tensors: Tensors, outputs: int, inputs: int) -> np.ndarray:
        groups = tensors["g_idx"]
        zeros = [[bits_of(row, o, bits) + (not v2) for o in range(outputs)] for row in tensors["qzeros"]]

        def number(o: int, i: int) -> np.float32:
            code = bits_of(tensors["qweight"][:, o], i, bits)
            return times(code - zeros[groups[i]][o], tensors["scales"][groups[i], o])

        return by_number(outputs, inputs, number)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": order}
    return Kind({**config, "checkpoint_format": "gptq_v2" if v2 else "gptq", **more}, make, meant)


# AWQ: qweight packs a row's outputs, the eight of a word in the order 0 2 4 6 1 3 5 7.

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(group: int) -> Kind:
    def make(rng: Rng, module: str, outputs: int, inputs: int) -> Tensors:
        groups = -(-inputs // group)
        return {
            "qweight": words(rng, inputs, outputs // 8),
            "qzeros": words(rng, groups, outputs // 8),
            "scales": scales(rng, groups, outputs),
        }

    def meant(tensors: Tensors, outputs: int, inputs: int) -> np.ndarray:
        def at(row: np.ndarray, o: int) -> int:
            return bits_of(row[o // 8 : o // 8 + 1], AWQ_ORDER.index(o % 8), 4)

        def number(o: int, i: int) -> np.float32:
            code, zero = at(tensors["qweight"][i], o), at(tensors["qzeros"][i // group], o)
            return times(code - zero, tensors["scales"][i // group, o])

        return by_number(outputs, inputs, number)

    return Kind(
        {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, make, meant
    )


# fp8: a scale for each tile, each row or all.


def fp8_codes(rng: Rng, *shape: int) -> np.ndarray:
    """Every finite one."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] ^= 1
    return codes.view(ml_dtypes.float8_e4m3fn)


def e4m3(code: int) -> float:
    """Sign, four bits of exponent with a bias of 7, three of mantissa; without infinities."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def tiled(outputs: int, inputs: int, tile: tuple[int, int]) -> tuple[int, int]:
    return -(-outputs // tile[0]), -(-inputs // tile[1])


def fp8(tile: tuple[int, int] | None, *, name: str = "weight_scale_inv", exponents: bool = False) -> Kind:
    """tile: None is one scale for all; (1, 0) one a row."""

    def make(rng: Rng, module: str, outputs: int, inputs: int) -> Tensors:
        shape: tuple[int, ...] = (
            () if tile is None else (outputs, 1) if tile == (1, 0) else tiled(outputs, inputs, tile)
        )
        kept = scales(rng, *shape, dtype=np.float32)
        if exponents:
            kept = rng.integers(115, 121, shape).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
        return {"weight": fp8_codes(rng, outputs, inputs), name: kept}

    def meant(tensors: Tensors, outputs: int, inputs: int) -> np.ndarray:
        codes, kept = tensors["weight"].view(np.uint8), tensors[name]

        def number(o: int, i: int) -> np.float32:
            scale = kept if tile is None else kept[o, 0] if tile == (1, 0) else kept[o // tile[0], i // tile[1]]
            if exponents:
                scale = 2.0 ** (int(scale.view(np.uint8)) - 127)
            return times(e4m3(int(codes[o, i])), scale)

        return by_number(outputs, inputs, number)

    block = None if tile is None or tile == (1, 0) else list(tile)
    named = {"weight_block_size": block} if name == "weight_scale_inv" else {}
    return Kind({"quant_method": "fp8", "activation_scheme": "dynamic", **named}, make, meant)


# compressed-tensors: codes with a sign, packed ones half the range too large; zeros are packed along the outputs.


def compressed(
    bits: int, strategy: str, *, group: int | None = None, symmetric: bool = True, packed: bool = True,
    block: tuple[int, int] | None = None, kind: str = "int", order: bool = False, fmt: str | None = None,
) -> Kind:  # fmt: skip
    def tile(outputs: int, inputs: int) -> tuple[int, int]:
        return {
            "tensor": (outputs, inputs),
            "channel": (1, inputs),
            "group": (1, group or 0),
            "block": block or (0, 0),
        }[strategy]

    half = 1 << (bits - 1)

    def make(rng: Rng, module: str, outputs: int, inputs: int) -> Tensors:
        down, across = tiled(outputs, inputs, tile(outputs, inputs))
        shape = (1,) if strategy == "tensor" else (down, across)
        tensors = {"weight_scale": scales(rng, *shape, dtype=ml_dtypes.bfloat16)}
        if packed:
            tensors["weight_packed"] = words(rng, outputs, -(-inputs * bits // 32))
            tensors["weight_shape"] = np.array([outputs, inputs], np.int64)
        elif kind == "float":
            tensors["weight"] = fp8_codes(rng, outputs, inputs)
        else:
            tensors["weight"] = rng.integers(-half, half, (outputs, inputs)).astype(np.int8)
        if not symmetric:
            zeros = rng.integers(-half, half, shape).astype(np.int8)
            tensors["weight_zero_point"] = words(rng, -(-down * bits // 32), across) if packed else zeros
        if order:
            tensors["weight_g_idx"] = rng.permutation(np.arange(inputs) // (group or inputs)).astype(np.int32)
        return tensors

    def meant(tensors: Tensors, outputs: int, inputs: int) -> np.ndarray:
        high, wide = tile(outputs, inputs)
        down, across = tiled(outputs, inputs, (high, wide))
        kept = tensors["weight_scale"].reshape(down, across)

        def code(o: int, i: int) -> float:
            if packed:
                return bits_of(tensors["weight_packed"][o], i, bits) - half
            return (
                e4m3(int(tensors["weight"].view(np.uint8)[o, i])) if kind == "float" else int(tensors["weight"][o, i])
            )

        def zero(o: int, g: int) -> int:
            if symmetric:
                return 0
            stored = tensors["weight_zero_point"]
            return bits_of(stored[:, g], o, bits) - half if packed else int(stored.reshape(down, across)[o, g])

        def number(o: int, i: int) -> np.float32:
            g = int(tensors["weight_g_idx"][i]) if order else i // wide
            return times(code(o, i) - zero(o // high, g), kept[o // high, g])

        return by_number(outputs, inputs, number)

    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": group}
    if block:
        weights["block_structure"] = list(block)
    fmt = fmt or ("pack-quantized" if packed else f"{kind}-quantized")
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    config = {"quant_method": "compressed-tensors", "format": fmt, "config_groups": groups, "ignore": ["lm_head"]}
    return Kind({**config, "quantization_status": "compressed"}, make, meant)


# mxfp4: e2m1 in pairs, 32 with an exponent.

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_experts(rng: Rng, experts: int, inputs: int, outputs: int) -> tuple[Tensors, np.ndarray]:
    """Blocks and scales, and the float32[experts, inputs, outputs] that they stand for."""
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    kept = rng.integers(119, 123, (experts, outputs, inputs // 32)).astype(np.uint8)
    meant = np.empty((experts, inputs, outputs), np.float32)
    for e, o, i in np.ndindex(experts, outputs, inputs):
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        code = byte >> 4 if i % 2 else byte & 15
        sign = -1 if code & 8 else 1
        meant[e, i, o] = sign * E2M1[code & 7] * 2.0 ** (int(kept[e, o, i // 32]) - 127)
    return {"blocks": blocks, "scales": kept}, meant


def plain_tensors(folder: Path, rng: Rng) -> Tensors:
    """Random float32 tensors of the names and shapes that the folder's config.json asks for."""
    family, config = read_config(folder / "config.json", ("quantization_config",))
    table = family.table(config)
    return {
        part.name: rng.uniform(-0.1, 0.1, part.piece.shape(part.shape, config)).astype(np.float32)
        for path, spec in sorted(parameter_specs(config).items())
        for part in leaves_of(parts_of(config, table, path, spec.shape))
    }


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or ".experts." in name


def write_coded(folder: Path, family: str, kind: Kind, **fields: Any) -> tuple[Path, Tensors]:
    """A folder with every Linear of its layers kept as `kind` says, and the plain tensors that it stands for."""
    fields = {"num_hidden_layers": 2, "layer_types": None, **fields}
    write_folder(folder, family, **fields, quantization_config=kind.config)
    rng = np.random.default_rng(sum(map(ord, json.dumps(kind.config))))
    plain, stored = plain_tensors(folder, rng), {}
    for name in sorted(plain):
        if not is_linear(name):
            stored[name] = plain[name]
            continue
        outputs, inputs = plain[name].shape
        module = name.removesuffix(".weight")
        tensors = kind.make(rng, module, outputs, inputs)
        stored.update({f"{module}.{part}": array for part, array in tensors.items()})
        plain[name] = kind.meant(tensors, outputs, inputs)
    (folder / SINGLE).unlink(missing_ok=True)
    write_tensors(folder, stored)
    return folder, plain


def write_plain(folder: Path, like: Path, tensors: Tensors) -> Path:
    """A folder of plain tensors, with the config.json of another one but for its quantization_config."""
    folder.mkdir(parents=True)
    config = json.loads((like / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((like / "tokenizer.json").read_bytes())
    write_tensors(folder, tensors)
    return folder


def write_mxfp4(folder: Path, **fields: Any) -> tuple[Path, Tensors]:
    """As write_coded, gpt-oss as it is published."""
    fields = {"num_hidden_layers": 2, "layer_types": None, "hidden_size": 64, "intermediate_size": 32, **fields}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    write_folder(folder, "gpt_oss", **fields, quantization_config=config)
    rng = np.random.default_rng(4)
    plain = plain_tensors(folder, rng)
    stored = dict(plain)
    for name in sorted(plain):
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors, plain[name] = mxfp4_experts(rng, *plain[name].shape)
            del stored[name]
            stored.update({f"{name}_{part}": array for part, array in tensors.items()})
    (folder / SINGLE).unlink(missing_ok=True)
    write_tensors(folder, stored)
    return folder, plain


def stored(folder: Path) -> Tensors:
    """As the file has them, in memory of their own."""
    files = TensorFiles(folder, codes=True)
    return {name: np.array(files.array(name)) for name in files.tensors}
