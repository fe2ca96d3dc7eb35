"""What the machine is said to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import jax
import pytest

from isthmus.model.device.hardware import platform_of


@pytest.mark.parametrize(
    "platform, version, name",
    [
        ("gpu", "PJRT C API\ncuda 12090", "cuda"),
        ("gpu", "PJRT C API\nrocm 60300", "rocm"),
        ("gpu", "oneAPI 1.0", "gpu"),
        ("tpu", "PJRT C API\nTFRT TPU v5 lite", "tpu"),
    ],
)
def test_makers_of_gpus_are_told_apart(platform: str, version: str, name: str) -> None:
    """A kernel for one maker's devices fails on another's, and JAX calls all of them "gpu". What devices say of
    themselves is made up here: tests run where there are none."""
    device: Any = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    assert platform_of(cast(jax.Device, device)) == name


def test_this_machine_is_a_cpu() -> None:
    """As the tests' settings say it is: the CPU's kernels are chosen by that name."""
    assert platform_of(jax.devices()[0]) == "cpu"
