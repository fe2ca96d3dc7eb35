"""What LoRA adapters add to a product, where each row has an adapter of its own, or none (Hu et al. 2021, arXiv
2106.09685).

The reference multiplies every row by the first factors of all adapters, which are narrow, and keeps of that what is its
own adapter's: two plain products, which a mesh splits as it does any other. Factors that model/ops/cpu/packed.py has
packed are multiplied by its C++ kernel, the implementation "cpu", which reads those that are chosen and no others.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.model.ops.cpu.kernel import cpu_kernel, is_not_packed
from isthmus.model.ops.cpu.packed import Packed
from isthmus.model.ops.operation import REFERENCE, Operation, Setting

Factors = jax.Array | Packed
"""Those of all adapters: an array [adapters, inputs, outputs], or packed"""


def add_lora(
    base: jax.Array, x: jax.Array, a: Factors, b: Factors, chosen: jax.Array, *, implementation: str = REFERENCE
) -> jax.Array:
    """base[row] + (x[row] @ a[adapter of row]) @ b[adapter of row], float32[rows, outputs]; base[row] without one.

    base: float32[rows, outputs]; x: [rows, inputs]; a: [adapters, inputs, rank] and b: [adapters, rank, outputs], of
    x's dtype, to which the inner product is rounded; chosen: int32[rows], 0 for no adapter and i for the i-th of them.
    A row's result depends on that row and its adapter alone; by the kernel, to the bit.
    """
    return LORA[implementation](base, x, a, b, chosen)


def _reference(base: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, chosen: jax.Array) -> jax.Array:
    adapters, _, rank = a.shape
    inner = jnp.einsum("ti,nir->tnr", x, a.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
    own = chosen[:, None] == 1 + jnp.arange(adapters)
    inner = jnp.where(own[..., None], inner, 0).reshape(-1, adapters * rank)
    outer = b.astype(x.dtype).reshape(adapters * rank, -1)
    return base + jnp.matmul(inner, outer, preferred_element_type=jnp.float32)


def _cpu(base: jax.Array, x: jax.Array, a: Factors, b: Factors, chosen: jax.Array) -> jax.Array:
    """What isn't packed as the reference does."""
    if not isinstance(a, Packed) or not isinstance(b, Packed):
        assert not isinstance(a, Packed) and not isinstance(b, Packed), (a, b)
        return _reference(base, x, a, b, chosen)
    assert a.kind == b.kind and a.count == b.count, (a, b)
    out = jax.ShapeDtypeStruct(base.shape, jnp.float32)
    call = jax.ffi.ffi_call(f"isthmus_lora_{a.kind}", out, input_output_aliases={1: 0})
    sizes = {"adapters": np.int64(a.count), "rank": np.int64(b.inputs)}
    result: jax.Array = call(x, base, chosen, a.index, a.lines, b.index, b.lines, **sizes)
    return result


def _is_used(setting: Setting) -> bool:
    return setting.model.lora.adapters > 0


LORA: Operation[Callable[..., jax.Array]] = Operation(
    "lora", _reference, (cpu_kernel(_cpu, is_not_packed),), is_used=_is_used
)
"""Called with the products so far, x, the factors of all adapters and each row's choice."""
