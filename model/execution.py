"""How a network is computed on a machine, apart from what it computes (`isthmus.model.config.ModelConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from isthmus.model.ops.kernels import REFERENCES, Kernels
from isthmus.model.parameter import Dtype

Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class Execution:
    """Choices that change speed, memory use and rounding, but not which function the network computes."""

    dtype: Dtype = "float32"
    """Dtype of activations, and of matrices when they are multiplied; trained parameters stay float32"""
    scan_layers: bool = False
    """Compile one body for all layers, so that compile time doesn't grow with depth; for accelerators, slow on CPU"""
    remat: Remat = "none"
    """What the backward pass computes again: nothing (none), all but matrix products (dots), or everything (full)"""
    kernels: Annotated[Kernels, tyro.conf.Fixed, tyro.conf.Suppress] = REFERENCES
    """The implementation of each operation, which `isthmus.model.ops.kernels.choose` gives for the devices at hand"""


DEFAULT_EXECUTION = Execution()
"""float32, and one array per layer; works on every platform"""

PRESET_EXECUTIONS: dict[str, Execution] = {
    "350m": Execution("bfloat16", scan_layers=True),
    "1b": Execution("bfloat16", scan_layers=True, remat="dots"),
    "3b": Execution("bfloat16", scan_layers=True, remat="full"),
    "8b": Execution("bfloat16", scan_layers=True, remat="full"),
}
"""What the larger presets of `isthmus.model.config.PRESETS` are trained with; the others take the defaults."""
