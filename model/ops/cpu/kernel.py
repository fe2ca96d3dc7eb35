"""What all of the CPU's kernels have in common."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.model.ops.cpu import library
from isthmus.model.ops.operation import Function, Kernel, Setting, with_gradient_of


def is_not_packed(setting: Setting) -> str | None:
    """What refuses a kernel that multiplies packed matrices."""
    return "it multiplies packed matrices, and layers that are scanned aren't packed" if setting.scans_layers else None


def cpu_kernel(
    run: Function,
    refuses: Callable[[Setting], str | None] = lambda setting: None,
    *,
    gradient_of: Function | None = None,
) -> Kernel[Function]:
    """The table's entry of a C++ kernel: on one device, where the library could be compiled, and with the gradient of
    the reference that is given, if any."""
    return Kernel(
        "cpu",
        ("cpu",),
        run if gradient_of is None else with_gradient_of(gradient_of, run),
        has_gradient=gradient_of is not None,
        trains_by_name=True,
        refuses=refuses,
        missing=lambda: library.why_not(),
    )
