"""Which implementation an operation takes: what can't run is refused with the reason, or done without where one may."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from isthmus.errors import ConfigError
from isthmus.model.config import LatentConfig, MixtureConfig
from isthmus.model.ops.kernels import OPERATIONS, REFERENCES, Kernels, announcement, choose, fallbacks
from isthmus.model.ops.operation import Kernel, Operation, Setting
from tests.support import TINY

SERVING = Setting(TINY, "float32", "cpu", page_size=16, cache_dtype="float32")
TRAINING = Setting(TINY, "float32", "cpu", takes_gradients=True)
OTHER_GATE = dataclasses.replace(TINY, activation="gelu")
LATENT = dataclasses.replace(
    TINY, kv_heads=1, head_dim=24, latent=LatentConfig(rank=16, rope_dim=8, nope_dim=8, value_dim=8)
)
EXPERTS = dataclasses.replace(TINY, mixture=MixtureConfig(experts=4, per_token=2, dim=16))
USED = "linear, paged_attention, norm, rotary, gated, sampling, flag"
"""The operations of serving a dense network"""


@pytest.mark.usefixtures("kernels")
def test_a_cpu_serves_by_its_kernels() -> None:
    """They are several times as fast, and give a token the same bits in any batch, with experts and without."""
    kernels = choose("auto", SERVING)
    assert kernels == choose("cpu", SERVING)
    assert kernels == Kernels(
        linear="cpu", paged_attention="cpu", norm="cpu", rotary="cpu", gated="cpu", sampling="cpu", flag="cpu"
    )
    assert announcement(kernels, SERVING) == "kernels: cpu" and not fallbacks(kernels, SERVING)
    for model in (EXPERTS, LATENT):
        setting = dataclasses.replace(SERVING, model=model)
        kernels = choose("auto", setting)
        assert kernels.grouped_matmul == "cpu" and announcement(kernels, setting) == "kernels: cpu"


@pytest.mark.parametrize(
    "changes, operations, reason",
    [
        ({"devices": 2}, USED, "it runs on one device, and there are 2"),
        ({"takes_gradients": True}, "paged_attention, sampling, flag", "it has no gradient"),
        ({"scans_layers": True}, "linear", "layers that are scanned aren't packed"),
        ({"model": OTHER_GATE}, "gated", "it doesn't have the activation gelu"),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_what_can_not_run_is_done_without_or_refused(changes: dict, operations: str, reason: str) -> None:
    """Auto does without, and says so; a kernel that was asked for by its name is never silently another."""
    setting = dataclasses.replace(SERVING, **changes)
    kernels = choose("auto", setting)
    assert all(getattr(kernels, name) == "reference" for name in operations.split(", "))
    (line,) = fallbacks(kernels, setting)
    assert line.startswith(f"without the cpu kernels of {operations}: ") and reason in line
    with pytest.raises(ConfigError, match=f"^kernels=cpu can't compute {operations.split(', ')[0]}: .*{reason}"):
        choose("cpu", setting)


def test_another_platform_has_none_of_them_to_miss() -> None:
    """A GPU isn't told that the CPU's kernels are missing, unless it is asked for them."""
    setting = dataclasses.replace(SERVING, platform="cuda")
    assert choose("auto", setting) == REFERENCES and fallbacks(REFERENCES, setting) == []
    with pytest.raises(ConfigError, match="it is for cpu, and the devices are cuda"):
        choose("cpu", setting)


def test_training_takes_the_references() -> None:
    """The CPU's kernels make it no faster: they are for whoever wants serving's bits, and asks for them by name."""
    assert choose("auto", TRAINING) == choose("reference", TRAINING) == REFERENCES
    assert announcement(REFERENCES, TRAINING) == "kernels: reference"


@pytest.mark.usefixtures("kernels")
def test_training_takes_the_kernels_that_are_named() -> None:
    """All of them: one reference among them would change the bits that serving gives."""
    for model in (TINY, EXPERTS, LATENT):
        setting = dataclasses.replace(TRAINING, model=model)
        assert announcement(choose("cpu", setting), setting) == "kernels: cpu"


def test_a_name_that_no_kernel_has_is_an_error() -> None:
    """A slip of the pen would else serve by the reference."""
    with pytest.raises(ConfigError, match=r"^kernels=cpus must be one of auto, reference, cpu$"):
        choose("cpus", SERVING)


@pytest.mark.usefixtures("kernels")
def test_single_operations_may_take_others() -> None:
    """What one kernel does to speed or bits is seen by leaving out that one."""
    kernels = choose("auto, linear=reference", SERVING)
    assert kernels == dataclasses.replace(choose("cpu", SERVING), linear="reference")
    assert "linear reference, paged_attention cpu" in announcement(kernels, SERVING)
    assert choose("auto , linear = reference", SERVING) == kernels
    assert choose("reference,norm=cpu,rotary=auto", SERVING) == Kernels(norm="cpu", rotary="cpu")
    assert choose("auto,routing=cpu", SERVING) == choose("auto", SERVING), "a dense network doesn't call it"
    with pytest.raises(ConfigError, match="kernels=cpu can't compute paged_attention: it has no gradient"):
        choose("reference,paged_attention=cpu", dataclasses.replace(SERVING, takes_gradients=True))


@pytest.mark.usefixtures("kernels")
def test_what_was_left_to_auto_says_why_it_can_not_run() -> None:
    """Also beside an operation that was chosen, of which nobody has to be told."""
    setting = dataclasses.replace(SERVING, devices=2)
    (line,) = fallbacks(choose("auto,norm=reference", setting), setting, "auto,norm=reference")
    assert line.startswith(f"without the cpu kernels of {USED.replace('norm, ', '')}: ")
    assert fallbacks(REFERENCES, setting, "reference") == []
    (line,) = fallbacks(choose("reference,norm=auto", setting), setting, "reference,norm=auto")
    assert line.startswith("without the cpu kernels of norm: ")


@pytest.mark.parametrize(
    "wish, said",
    [
        ("auto,lin=cpu", "kernels=auto,lin=cpu: 'lin' must be one of linear, attention, "),
        ("auto,linear", "kernels=auto,linear: linear= must be one of auto, reference, cpu"),
        ("auto,linear=gpu", "kernels=auto,linear=gpu: linear= must be one of auto, reference, cpu"),
        ("linear=cpu", "kernels=linear=cpu: 'linear=cpu' must be one of auto, reference, cpu"),
        ("auto,linear=cpu,linear=auto", "kernels=auto,linear=cpu,linear=auto names linear twice"),
        ("auto,", "kernels=auto,: '' must be one of linear, "),
    ],
)
def test_a_choice_that_says_nothing_is_an_error(wish: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose(wish, SERVING)
    assert str(refused.value).startswith(said)


def test_every_operation_has_its_place_in_the_choice() -> None:
    """An operation whose name isn't a field could never be chosen."""
    assert {operation.name for operation in OPERATIONS} == {field.name for field in dataclasses.fields(Kernels)}


def double(x: jax.Array) -> jax.Array:
    return 2 * x


TABLE = Operation(
    "double",
    double,
    (
        Kernel("wide", ("tpu",), double, dtypes=("bfloat16",), many_devices=True),
        Kernel("lean", ("tpu", "cuda"), double, has_gradient=True, refuses=lambda s: "no" if s.page_size else None),
        Kernel("here", ("cpu",), lambda x: x + x, missing=lambda: "there is no compiler"),
    ),
)
"""An operation as other platforms' kernels will make them"""


@pytest.mark.parametrize(
    "setting, taken",
    [
        (Setting(TINY, "bfloat16", "tpu", 4), "wide"),
        (Setting(TINY, "bfloat16", "tpu", takes_gradients=True), "lean"),
        (Setting(TINY, "float32", "tpu"), "lean"),
        (Setting(TINY, "float32", "tpu", page_size=16), "reference"),
        (Setting(TINY, "float32", "cuda"), "lean"),
        (Setting(TINY, "float32", "cuda", 2), "reference"),
        (Setting(TINY, "float32", "cpu"), "reference"),
    ],
)
def test_the_first_of_a_platform_that_can_run_is_taken(setting: Setting, taken: str) -> None:
    """A platform has several, for other dtypes and shapes; none may be taken where it would fail."""
    assert TABLE.choose("auto", setting) == taken
    assert TABLE[taken](jnp.float32(2)) == 4


def test_a_missing_kernel_says_why() -> None:
    setting = Setting(TINY, "float32", "cpu")
    assert TABLE.refusals(setting) == {"here": "there is no compiler"}
    with pytest.raises(ConfigError, match=r"^kernels=here can't compute double: there is no compiler"):
        TABLE.choose("here", setting)
