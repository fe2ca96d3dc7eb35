"""What the machine can do: peak FLOP/s and memory bandwidth, from the data sheet if it is known, else measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from isthmus.errors import ConfigError
from isthmus.model.parameter import Dtype
from isthmus.model.process.resources import free_main_memory, usable_cpus

_DATA_SHEET = {
    # device_kind: (dense bf16 FLOP/s, bytes/s)
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "TPU v4": (275e12, 1.2e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v5": (459e12, 2.77e12),
    "TPU v6 lite": (918e12, 1.64e12),
    "TPU7x": (2307e12, 7.4e12),
}
"""From the makers' data sheets, per device as JAX counts devices."""


@dataclass(frozen=True)
class Limits:
    """The limits of the hardware, summed over all devices."""

    flops: float
    """FLOP/s of a large matrix product in the dtype that was asked for"""
    bandwidth: float
    """Bytes/s read from main memory"""
    source: str
    """'data sheet' or 'measured'"""


def platform_of(device: jax.Device) -> str:
    """The device's platform: "cpu", "cuda", "rocm", "tpu", or what JAX calls another one. To JAX both of cuda and rocm
    are "gpu", and so is Intel's."""
    if device.platform != "gpu":
        return device.platform
    version = device.client.platform_version
    return next((name for name in ("cuda", "rocm") if name in version), device.platform)


@cache
def peak_flops(dtype: str = "float32", devices: int = 1) -> tuple[float, str]:
    """FLOP/s of `devices` devices in `dtype`, and its source: 'data sheet' or, which takes a moment, 'measured'."""
    sheet = _DATA_SHEET.get(jax.devices()[0].device_kind)
    if sheet is not None and dtype == "bfloat16":
        return sheet[0] * devices, "data sheet"
    return measure_gemm(dtype) * _independent(devices), "measured"


def limits(dtype: str = "float32", devices: int = 1) -> Limits:
    """Peak FLOP/s in `dtype` and memory bandwidth of `devices` devices."""
    sheet = _DATA_SHEET.get(jax.devices()[0].device_kind)
    flops, source = peak_flops(dtype, devices)
    bandwidth = sheet[1] if sheet is not None else measure_bandwidth()
    return Limits(flops, bandwidth * _independent(devices), source)


def _independent(devices: int) -> int:
    """How many of the devices have hardware of their own: virtual CPU devices share the same cores."""
    return 1 if jax.devices()[0].platform == "cpu" else devices


def _best_seconds(run: Callable[[], jax.Array], repeats: int = 7) -> float:
    run().block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def default_dtype() -> Dtype:
    """The dtype used unless another one is asked for: float32 on CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_dtype(dtype: str) -> None:
    """Raises ConfigError for a dtype that the installed jax doesn't support well: bfloat16 on CPU before jax 0.12."""
    old = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12)
    if dtype == "bfloat16" and old and jax.default_backend() == "cpu":
        raise ConfigError("dtype=bfloat16 on CPU needs jax 0.12 or newer, and so Python 3.12 or newer; use float32")


def free_memory(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on `device`, or None on a platform that doesn't tell. On CPU they are main
    memory, which all virtual devices share."""
    if device.platform == "cpu":
        return free_main_memory()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def measure_gemm(dtype: str) -> float:
    """FLOP/s of a large matrix product in `dtype`, the best of several runs."""
    m, k, n = (1024, 1024, 4096) if jax.devices()[0].platform == "cpu" else (8192, 8192, 8192)
    a = jnp.ones((m, k), dtype)
    b = jnp.ones((k, n), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2 * m * k * n / _best_seconds(lambda: product(a, b), repeats=5)


def measure_bandwidth() -> float:
    """Bytes/s of summing 512 MiB, which no cache holds, over all cores; the best of several runs."""
    parts = usable_cpus()
    x = jax.device_put(np.ones((parts, (512 << 20) // 4 // parts), np.float32))
    total = jax.jit(lambda x: x.sum(axis=1))
    return x.nbytes / _best_seconds(lambda: total(x))
