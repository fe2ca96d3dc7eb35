"""GPTQ and AWQ: integers [inputs, outputs] with zeros and scales for groups of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.weights.huggingface.coded.matrix import (
    Coded,
    Find,
    Found,
    InputsFirst,
    fits,
    group_of,
    plain_dtype,
    scales_of,
    two_axes,
    wanted,
)
from isthmus.model.weights.huggingface.coded.numbers import awq_words, unpack_rows
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.huggingface.files import TensorFiles

_BITS = (2, 3, 4, 8)
_SCALES = ("float16", "bfloat16", "float32")
_HOW = {  # what GPTQModel, AutoGPTQ and AutoAWQ write about how they quantized; decoding doesn't depend on it
    "gptq": (
        "damp_percent", "static_groups", "true_sequential", "model_name_or_path", "model_file_base_name", "meta",
        "lm_head", "desc_act", "sym", "act_group_aware", "dynamic", "tokenizer", "dataset", "backend", "model_seqlen",
        "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "max_input_length",
        "cache_block_outputs", "modules_in_block_to_quantize", "use_exllama", "exllama_config", "disable_exllama",
        "use_cuda_fp16", "cache_examples_on_gpu", "damp_auto_increment", "mse", "pack_dtype", "quantizer", "uri",
        "parallel_packing", "offload_to_disk",
    ),
    "awq": (
        "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
        "exllama_config", "desc_act", "sym", "modules_in_block_to_quantize", "meta", "lm_head", "dynamic", "pack_dtype",
    ),
}  # fmt: skip


def gptq(fields: Fields) -> Find:
    """Reads the settings of GPTQ, with `qweight, qzeros, scales, g_idx` for each Linear, as GPTQModel and AutoGPTQ
    write them. The format "gptq" stores zeros less one (GPTQModel, utils/model.py:
    convert_gptq_v1_to_v2_format_module), and "gptq_v2" stores them as they are."""
    for name in _HOW["gptq"]:
        fields.raw(name, None)
    bits = fields.among("bits", _BITS)
    kind = fields.among("checkpoint_format", (None, "gptq", "gptq_v2"), None)
    named = fields.among("format", (None, "gptq", "gptq_v2"), None)
    fields.among("is_marlin_format", (None, False), None)
    fields.among("pack_dtype", (None, "int32"), None)
    group = _group_size(fields)
    mixed = bool(fields.raw("dynamic", None))  # some modules have other bits and groups, which follow from their shapes
    less_one = (kind or named or "gptq") == "gptq"
    return partial(_find_gptq, bits=None if mixed else bits, group=None if mixed else group, less_one=less_one)


def awq(fields: Fields) -> Find:
    """Reads the settings of AWQ, with `qweight, qzeros, scales` for each Linear, as AutoAWQ's version "gemm" writes
    them (awq/modules/linear/gemm.py: WQLinear_GEMM)."""
    for name in _HOW["awq"]:
        fields.raw(name, None)
    fields.among("bits", (4,))
    fields.among("zero_point", (True,), True)
    kind = fields.raw("version", None) or fields.raw("format", None) or "gemm"
    fields.raw("format", None)
    if not isinstance(kind, str) or kind.lower() != "gemm":
        raise fields.error("version" if "version" in fields else "format", "is not supported here; only 'gemm'")
    return partial(_find_awq, group=_group_size(fields))


def _group_size(fields: Fields) -> int:
    """Reads the number of inputs that share a scale; -1 means all of them."""
    size = fields.integer("group_size", 128, low=-1)
    if not size:
        raise fields.error("group_size", "must be a whole number, at least 1, or -1 for all inputs")
    return size


def _modules(files: TensorFiles) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight"))


def _find_gptq(files: TensorFiles, bits: int | None, group: int | None, less_one: bool) -> Found:
    return Found([_gptq(files, module, bits, group, less_one) for module in _modules(files)])


def _gptq(files: TensorFiles, module: str, said: int | None, size: int | None, less_one: bool) -> Coded:
    words, zeros, (groups, outputs), parts = _parts(files, module)
    bits = 32 * zeros[1] // max(1, outputs) if said is None else said
    if bits not in _BITS:
        raise ConfigError(f"{files.folder}: {module}.qzeros and {module}.scales make numbers of {bits} bits, which are "
                          f"not supported; only {', '.join(map(str, _BITS))}")  # fmt: skip
    unit = math.lcm(bits, 32)
    inputs = words[0] * 32 // bits
    order = f"{module}.g_idx"
    if order in files.tensors:
        stored = wanted(files, order, f"{module}.qweight", ("int32", "int64"))
        inputs = stored.shape[0] if len(stored.shape) == 1 else -1
        parts = (*parts, order)
    _fits(files, f"{module}.qweight", (math.ceil(inputs * bits / unit) * unit // 32, outputs), f"{bits} bits make it")
    _fits(files, f"{module}.qzeros", (groups, math.ceil(outputs * bits / unit) * unit // 32), f"{bits} bits make it")
    group = _group(files, module, inputs, groups, size)

    def grid() -> InputsFirst:
        array = files.array(f"{module}.qzeros")
        if less_one and 32 % bits == 0:
            # A zero of 0, less one, has borrowed from its neighbour. Adding to whole words pays that back.
            ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
            array = (array.view(np.uint32) + ones).view(np.int32)
        found = unpack_rows(np.ascontiguousarray(array.T), bits).T[:, :outputs]
        if less_one and 32 % bits:
            found = (found + 1) & ((1 << bits) - 1)
        return InputsFirst(
            files.array(f"{module}.qweight"),
            (inputs, outputs),
            scales_of(files, f"{module}.scales"),
            group_of(files, order, inputs, group, groups),
            _one_for_all(found),
            bits,
        )

    return _coded(files, module, parts, (inputs, outputs), f"GPTQ, {bits} bits in groups of {group}", grid)


def _find_awq(files: TensorFiles, group: int) -> Found:
    return Found([_awq(files, module, group) for module in _modules(files)])


def _awq(files: TensorFiles, module: str, size: int) -> Coded:
    words, _, (groups, outputs), parts = _parts(files, module)
    inputs = words[0]
    _fits(files, f"{module}.qweight", (inputs, outputs // 8), "its scales make it")
    _fits(files, f"{module}.qzeros", (groups, outputs // 8), "its scales make it")
    if outputs % 8:
        raise ConfigError(f"{files.folder}: {module}.scales has {outputs} outputs, which AWQ keeps in words of 8")
    group = _group(files, module, inputs, groups, size)

    def grid() -> InputsFirst:
        numbers = awq_words()
        return InputsFirst(
            files.array(f"{module}.qweight"),
            (inputs, outputs),
            scales_of(files, f"{module}.scales"),
            np.arange(inputs) // group,
            _one_for_all(numbers.decode(files.array(f"{module}.qzeros"))),
            4,
            numbers,
        )

    return _coded(files, module, parts, (inputs, outputs), f"AWQ, 4 bits in groups of {group}", grid)


def _parts(
    files: TensorFiles, module: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Returns the shapes of qweight, qzeros and scales, which all have two axes, and the names of these tensors."""
    owner = f"{module}.qweight"
    kinds = {"qweight": ("int32",), "qzeros": ("int32",), "scales": _SCALES}
    names = tuple(f"{module}.{part}" for part in kinds)
    shapes = [wanted(files, name, owner, kinds[part]).shape for name, part in zip(names, kinds, strict=True)]
    for name, shape in zip(names, shapes, strict=True):
        two_axes(files, name, shape)
    return shapes[0], shapes[1], shapes[2], names


def _fits(files: TensorFiles, name: str, shape: tuple[int, int], why: str) -> None:
    fits(files, name, files.tensors[name], shape, why)


def _group(files: TensorFiles, module: str, inputs: int, groups: int, size: int | None) -> int:
    """Returns the number of inputs that share a scale. size: the number in config.json; None means unknown, and inputs
    are divided evenly. Raises ConfigError where the groups don't fit."""
    group = inputs // max(1, groups) if size is None else size
    group = inputs if group < 0 else group
    if not group or math.ceil(inputs / group) != groups:
        raise ConfigError(
            f"{files.folder}: {module}.scales has {groups} groups, and {inputs} inputs in groups of {group} don't make "
            "that many"
        )
    return group


def _one_for_all(zeros: np.ndarray) -> np.ndarray | int:
    """Returns one int where all zeros are equal, and else all of them as float32."""
    first = int(zeros.flat[0]) if zeros.size else 0
    return first if (zeros == first).all() else zeros.astype(np.float32)


def _coded(
    files: TensorFiles,
    module: str,
    parts: tuple[str, ...],
    shape: tuple[int, int],
    what: str,
    grid: Callable[[], InputsFirst],
) -> Coded:
    return Coded(
        f"{module}.weight",
        shape[::-1],
        parts,
        sum(files.tensors[name].nbytes for name in parts),
        what,
        grid,
        transposed=True,
        dtype=plain_dtype(files.tensors[f"{module}.scales"].dtype),
    )
