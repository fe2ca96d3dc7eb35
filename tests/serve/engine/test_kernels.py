"""The kernels that were chosen for an engine are those that its steps call."""

from __future__ import annotations

import dataclasses
import re

import pytest
from jax.sharding import Mesh

from isthmus.checks.networks import NETWORKS
from isthmus.errors import ConfigError
from isthmus.model.execution import Execution
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.quantization import SCHEMES, quantize_params
from isthmus.serve.engine.programs import Served, abstract_like, lower_draw, lower_forward
from tests.serve.engine.harness import CONFIG, ENGINE
from tests.support import packed_params, random_params

SERVED = Served(CONFIG, ENGINE, CONFIG.vocab_size)
CALLS = {"linear_float32", "paged_attention", "rms_norm", "rotate_pairs", "gated_product", "sample", "sample_adjusted"}


def calls(served: Served, mesh: Mesh) -> set[str]:
    """The kernels of the CPU that a step of an engine calls."""
    params = random_params(CONFIG, mesh)
    if served.execution.kernels.packs_weights:
        params = packed_params(CONFIG, params)
    bucket = ENGINE.buckets[-1]
    programs = [lower_forward(served, bucket, mesh, abstract_like(params))]
    programs += [lower_draw(served, bucket.samples, mesh, adjusted=adjusted) for adjusted in (False, True)]
    return {call for program in programs for call in re.findall(r"@isthmus_(\w+)", program.as_text())}


def test_the_choice_reaches_every_operation(mesh: Mesh) -> None:
    """An operation that doesn't hear of it would be slow without a word, or have bits of its own."""
    packed_params(CONFIG, random_params(CONFIG, mesh))  # skips where there are no kernels
    assert calls(SERVED.with_kernels("cpu", mesh), mesh) == CALLS
    assert calls(SERVED.with_kernels("reference", mesh), mesh) == set()
    assert calls(SERVED, mesh) == set(), "nothing is chosen where nobody chose"


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("norm", {"rms_norm"}),
        ("rotary", {"rotate_pairs"}),
        ("gated", {"gated_product"}),
        ("sampling", {"sample", "sample_adjusted"}),
    ],
)
def test_each_operation_heeds_its_own(name: str, called: set[str], mesh: Mesh) -> None:
    """Where a kernel of one operation can't run, the others still do."""
    packed_params(CONFIG, random_params(CONFIG, mesh))
    kernels = dataclasses.replace(SERVED.with_kernels("cpu", mesh).execution.kernels, **{name: "reference"})
    served = dataclasses.replace(SERVED, execution=Execution(kernels=kernels))
    assert calls(served, mesh) == CALLS - called


@pytest.mark.parametrize("quantize", ["none", "int4"])
@pytest.mark.parametrize("network", ["dense", "experts", "latent attention", "adapters"])
def test_no_step_packs_weights(network: str, quantize: str, mesh: Mesh) -> None:
    """Serving packs them once, as it loads them. In every step, as the trainer must, it would cost more than the step:
    with the same tokens, so that only a clock would tell."""
    config = dataclasses.replace(NETWORKS[network], layers=1)
    wanted = Served(config, ENGINE.resolve(config), config.vocab_size).with_kernels("auto", mesh)
    params = random_params(config, mesh)
    if rules := SCHEMES[quantize]:
        quantize_params(config, params, rules)
    bucket = wanted.engine.buckets[-1]
    step = lower_forward(wanted, bucket, mesh, abstract_like(packed_params(config, params))).as_text()
    assert "@isthmus_linear_" in step and "pack_matrix" not in step


def test_an_engine_of_two_devices_refuses_kernels_for_one() -> None:
    """It would otherwise be slower than what was asked for, and nobody would know."""
    mesh = build_mesh(MeshShape(tp=2))
    assert SERVED.with_kernels("auto", mesh) == SERVED
    with pytest.raises(ConfigError, match="kernels=cpu can't compute linear: it runs on one device, and there are 2"):
        SERVED.with_kernels("cpu", mesh)
