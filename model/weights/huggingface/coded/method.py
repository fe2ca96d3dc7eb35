"""Reads config.json's `quantization_config`, which names the method by which a folder's matrices were made into codes
and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.model.weights.huggingface.coded.compressed import compressed_tensors
from isthmus.model.weights.huggingface.coded.floats import fp8, mxfp4
from isthmus.model.weights.huggingface.coded.grouped import awq, gptq
from isthmus.model.weights.huggingface.coded.matrix import Find
from isthmus.model.weights.huggingface.fields import Fields

FIELD = "quantization_config"
"""The field of config.json."""

METHODS: dict[str, Callable[[Fields], Find]] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors": compressed_tensors,
}
"""The methods by `quant_method`. Each takes its settings and returns the function that finds its matrices."""


@dataclass(frozen=True)
class Method:
    """How a folder's matrices are stored."""

    name: str
    find: Find


def read_method(fields: Fields) -> Method | None:
    """Reads the method; None where config.json names none. Raises ConfigError for an unknown method, or for a setting
    that isn't supported."""
    if fields.raw(FIELD, None) is None:
        return None
    inner = fields.inner(FIELD)
    name = inner.raw("quant_method", None)
    if not isinstance(name, str) or name not in METHODS:
        raise inner.error("quant_method", f"is not supported here; only {', '.join(METHODS)}: dequantize the model "
                                          "first, or take its original")  # fmt: skip
    find = METHODS[name](inner)
    inner.finish()
    return Method(name, find)
