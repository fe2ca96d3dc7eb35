"""One small executor, compiled once for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jax.sharding import Mesh

from tests.serve.engine.harness import CONFIG, SERVED, HookedExecutor
from tests.support import random_params


@pytest.fixture(scope="module")
def compiled(mesh: Mesh) -> HookedExecutor:
    executor = HookedExecutor(SERVED.with_kernels("auto", mesh), random_params(CONFIG, mesh), mesh)
    executor.warm_up()
    return executor


@pytest.fixture
def executor(compiled: HookedExecutor) -> Iterator[HookedExecutor]:
    yield compiled
    compiled.hook = lambda: None
