"""What all of the CPU's kernels have in common."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.model.ops.cpu import library
from isthmus.model.ops.operation import Function, Kernel, Setting


def is_not_packed(setting: Setting) -> str | None:
    """What refuses a kernel that multiplies packed matrices."""
    return "it multiplies packed matrices, and layers that are scanned aren't packed" if setting.scans_layers else None


def cpu_kernel(run: Function, refuses: Callable[[Setting], str | None] = lambda setting: None) -> Kernel[Function]:
    """The table's entry of a C++ kernel: without a gradient, on one device, where the library could be compiled."""
    return Kernel("cpu", ("cpu",), run, refuses=refuses, missing=lambda: library.why_not())
