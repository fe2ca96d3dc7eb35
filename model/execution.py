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
    """Choices that change speed, memory and rounding, and nothing of what the network is."""

    dtype: Dtype = "float32"
    """What activations and matrices are computed in; parameters are trained in float32 all the same"""
    scan_layers: bool = False
    """Compile one body for all layers: compile time stops growing with depth. Right on accelerators, slow on CPU"""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it: nothing, all but matrix products, or everything"""
    kernels: Annotated[Kernels, tyro.conf.Fixed, tyro.conf.Suppress] = REFERENCES
    """The implementation of each operation, which `isthmus.model.ops.kernels.choose` gives for the devices at hand"""


DEFAULT_EXECUTION = Execution()
"""float32, an array a layer: what is right everywhere"""

PRESET_EXECUTIONS: dict[str, Execution] = {
    "350m": Execution("bfloat16", scan_layers=True),
    "1b": Execution("bfloat16", scan_layers=True, remat="dots"),
    "3b": Execution("bfloat16", scan_layers=True, remat="full"),
    "8b": Execution("bfloat16", scan_layers=True, remat="full"),
}
"""What the larger presets of `isthmus.model.config.PRESETS` are trained with; the others take the defaults."""
