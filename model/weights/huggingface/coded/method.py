"""What config.json's `quantization_config` says: the method by which a folder's matrices were made codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.model.weights.huggingface.coded.compressed import compressed_tensors
from isthmus.model.weights.huggingface.coded.floats import fp8, mxfp4
from isthmus.model.weights.huggingface.coded.grouped import awq, gptq
from isthmus.model.weights.huggingface.coded.matrix import Find
from isthmus.model.weights.huggingface.fields import Fields

FIELD = "quantization_config"
"""Of config.json"""

METHODS: dict[str, Callable[[Fields], Find]] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "compressed-tensors": compressed_tensors,
}
"""By `quant_method`."""


@dataclass(frozen=True)
class Method:
    """How a folder's matrices are kept."""

    name: str
    find: Find


def read_method(fields: Fields) -> Method | None:
    """None where config.json speaks of no codes. Raises ConfigError for a method that isn't known, and a setting of one
    that is and that wouldn't be honoured."""
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
