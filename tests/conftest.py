"""What every test shares: eight virtual CPU devices, a tiny network, and its parameters."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Read by JAX when it is imported, so they come before every import that leads to it.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if not os.environ.get("ISTHMUS_EXACT"):
    # Most tests mostly compile, which takes XLA two thirds of the time with few optimizations. What promises bits is
    # marked `exact`, and the makefile runs it with all of them, as users do.
    _FLAGS += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
for _flag in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu, where it is installed, would ask the network for a TPU
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two workers may compile for one at a time

import jax
import pytest
from hypothesis import HealthCheck, settings
from jax.sharding import Mesh

from isthmus.model.config import ModelConfig
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params
from tests.support import TINY, random_params

EXACT = (
    "checks/test_determinism.py",
    "model/ops/",
    "parity/test_one_model.py",
    "serve/engine/test_adapters.py",
    "serve/engine/test_adjusted.py",
    "serve/engine/test_determinism.py",
    "serve/engine/test_drafts.py",
    "serve/engine/test_int8_cache.py",
    "serve/engine/test_launches.py",
    "serve/engine/test_resume.py",
    "serve/engine/test_scoring.py",
    "train/test_served_bits.py",
)
"""Tests that two programs, or one of ours and a definition, give the same bits"""
MOST_MAPPINGS = 20_000
"""Of memory, that a process may have when a module of tests ends"""

# The same examples on every run: a red test is a change in the code, never in the dice.
settings.register_profile(
    "isthmus",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "isthmus"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).as_posix().startswith(EXACT):
            item.add_marker(pytest.mark.exact)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Lets go of programs that were compiled for earlier modules. Each takes dozens of mappings of memory; Linux gives
    a process 65,530 of them, and one that needs more crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """One device."""
    return build_mesh(MeshShape())


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_params(tiny: ModelConfig, mesh: Mesh) -> Params:
    return random_params(tiny, mesh)
