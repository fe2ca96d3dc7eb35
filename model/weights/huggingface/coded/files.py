"""The tensors of a folder. A matrix that is stored as codes has the name that it has where it is stored as plain
numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.ops.quantized import RUN, Bits
from isthmus.model.weights.huggingface.coded.matrix import Coded
from isthmus.model.weights.huggingface.coded.method import Method
from isthmus.model.weights.huggingface.files import DTYPES, Exact, Integers, TensorFiles, View, WeightFiles


class CodedFiles(WeightFiles):
    """The tensors of a folder, of which those that are stored as codes are decoded when they are read."""

    says = "config.json"

    def __init__(self, folder: Path, method: Method) -> None:
        """Raises ConfigError for damaged files, and for matrices that lack a part or whose parts don't fit together."""
        self._raw = TensorFiles(folder, codes=True)
        self.folder = folder
        found = method.find(self._raw)
        self.coded: dict[str, Coded] = {each.name: each for each in found.coded}
        taken = {part for each in found.coded for part in each.parts}
        plain = {name: stored for name, stored in self._raw.tensors.items() if name not in taken.union(found.idle)}
        for name, stored in plain.items():
            if name in self.coded:
                raise ConfigError(f"{folder}: {name} is there although {self.coded[name].parts[0]} takes its place")
            if stored.dtype not in map(np.dtype, DTYPES.values()):
                raise ConfigError(
                    f"{folder}: {name} is stored as {stored.dtype.name}, and quant_method={method.name!r} of "
                    "config.json doesn't make it a part of a matrix"
                )
        self.tensors = {**plain, **self.coded}
        self._exact: dict[str, Exact | None] = {}

    def array(self, name: str) -> np.ndarray:
        if name not in self.coded:
            return self._raw.array(name)
        return self.coded[name].read(lambda array: array, np.dtype(np.float32))

    def read(self, name: str, view: View, dtype: np.dtype) -> np.ndarray:
        if name not in self.coded:
            return self._raw.read(name, view, dtype)
        return self.coded[name].read(view, dtype)

    def advise(self, name: str, advice: int) -> None:
        for part in self.coded[name].parts if name in self.coded else (name,):
            self._raw.advise(part, advice)

    def exact(self, name: str) -> Exact | None:
        if name not in self._exact:
            self._exact[name] = self._find_exact(name)
        return self._exact[name]

    def _find_exact(self, name: str) -> Exact | None:
        if name not in self.coded:
            return None
        grid = self.coded[name].grid()
        found = grid.centred
        if found is None or found.bits > 8 or (scales := _scale_dtype(grid.scales_by_group())) is None:
            return None
        inputs = self.coded[name].shape[1]
        whole = next((group for group in (256, 128, 64) if inputs % group == 0), RUN)
        group = whole if found.whole else math.gcd(found.group, 256)
        bits: Bits = next(bits for bits in (4, 5, 6, 8) if bits >= found.bits)
        return Exact(bits, group, scales) if group >= RUN else None

    def integers(self, name: str) -> Integers:
        coded, exact = self.coded[name], self.exact(name)
        grid = coded.grid()
        assert exact is not None and grid.centred is not None
        values, scales = grid.integers(), grid.scales_by_group()
        values = values if coded.transposed else values.T
        groups = np.arange(0, len(values), exact.group) // max(grid.centred.group, 1)
        narrow = scales[groups].astype(DTYPES["F16" if exact.scales == "float16" else "BF16"])
        return Integers(np.ascontiguousarray(values), narrow)

    def described(self, whole: Collection[str]) -> str:
        kinds = Counter(each.what for name, each in self.coded.items() if name not in whole)
        stay = Counter(self.coded[name].what for name in whole)
        said = [f"{count} matrices stay integers ({what})" for what, count in stay.items()]
        said += [f"{count} are turned back into floats as they are read ({what})" for what, count in kinds.items()]
        return f"quantization_config: {', '.join(said)}"

    def means_nothing(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros. AutoGPTQ gives every Linear a bias, which is zero where the model has
        none."""
        module = name.removesuffix(".bias")
        return module != name and f"{module}.weight" in self.coded and not self._raw.array(name).any()


def _scale_dtype(scales: np.ndarray) -> Literal["bfloat16", "float16"] | None:
    """The dtype that holds all scales exactly; None where neither does."""
    if np.array_equal(scales.astype(ml_dtypes.bfloat16).astype(np.float32), scales):
        return "bfloat16"
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    return "float16" if np.array_equal(halves.astype(np.float32), scales) else None


def open_tensors(folder: Path, method: Method | None) -> WeightFiles:
    """Opens the tensors of a published folder. method: None where all are plain numbers. Raises ConfigError."""
    return TensorFiles(folder) if method is None else CodedFiles(folder, method)
