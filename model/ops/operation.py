"""An operation's table: the reference that every backend runs, and the kernels that may take its place.

The design is tokamax's (https://github.com/openxla/tokamax): implementations have names, each says what it can't do,
and the reference is always there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.parameter import Dtype

REFERENCE = "reference"
"""The name of the implementation in jnp: it has a gradient and runs on any number of devices of any platform."""
AUTO = "auto"
"""The wish for the first kernel of a table that can run, and for the reference where none can."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Setting:
    """What is known of the work when an engine or a trainer is built. Kernels are chosen by it."""

    model: ModelConfig
    dtype: Dtype
    """What activations and matrices are computed in"""
    platform: str
    """The devices' platform: "cpu", "cuda", "rocm", "tpu", or what JAX calls another one"""
    devices: int = 1
    """How many devices the work is split over"""
    takes_gradients: bool = False
    scans_layers: bool = False
    """Whether the matrices of several layers lie in one array, as `Execution.scan_layers` says"""
    page_size: int = 0
    """Tokens in a page of the cache; 0 where there is no cache"""
    cache_dtype: str = ""
    """The dtype of the cache's pages; empty where there is no cache"""


@dataclass(frozen=True)
class Kernel(Generic[Function]):
    """An implementation of an operation beside its reference, and what it can do."""

    name: str
    """What the option --kernels calls it; unique within an operation"""
    platforms: tuple[str, ...]
    """The platforms that it runs on, as `Setting.platform` names them"""
    run: Function
    """Called as the operation's reference is"""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    many_devices: bool = False
    """Whether XLA can split it over the devices of a mesh"""
    has_gradient: bool = False
    trains_by_name: bool = False
    """Whether "auto" leaves it out where gradients are taken: training by it is for the bits, and no faster"""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Says why it can't compute a model or a cache like this; None where it can"""
    missing: Callable[[], str | None] = lambda: None
    """Says why this process doesn't have it; None where it does. Asked last, since it may compile"""

    def why_not(self, setting: Setting) -> str | None:
        """Why it can't run there, as a clause about "it"; None where it can."""
        if setting.platform not in self.platforms:
            return f"it is for {' and '.join(self.platforms)}, and the devices are {setting.platform}"
        if setting.devices > 1 and not self.many_devices:
            return f"it runs on one device, and there are {setting.devices}"
        if setting.dtype not in self.dtypes:
            return f"it computes in {' and '.join(self.dtypes)}, not in {setting.dtype}"
        if setting.takes_gradients and not self.has_gradient:
            return "it has no gradient"
        return self.refuses(setting) or self.missing()


def with_gradient_of(reference: Function, kernel: Function) -> Function:
    """`kernel`, with the gradient that `reference` has at the same arguments, which both are called with.

    Arguments are trees of arrays and of anything else; the arrays alone have gradients. Results are trees of arrays of
    the same shapes; where the kernel rounds one to another dtype, the reference is taken to do the same. The backward
    pass keeps the arguments, and computes again of the reference what its gradient needs.
    """

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def call(function: Function, arrays: Sequence[jax.Array]) -> Any:
            filled = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                filled[place] = array
            return function(*jax.tree.unflatten(tree, filled))

        @jax.custom_vjp
        def both(*arrays: jax.Array) -> Any:
            return call(kernel, arrays)

        def forward(*arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
            return both(*arrays), arrays

        def backward(arrays: tuple[jax.Array, ...], cotangents: Any) -> tuple[Any, ...]:
            out, pull_back = jax.vjp(lambda *arrays: call(reference, arrays), *arrays)
            return pull_back(jax.tree.map(lambda cotangent, x: cotangent.astype(x.dtype), cotangents, out))

        both.defvjp(forward, backward)
        return both(*(leaves[place] for place in places))

    return run  # type: ignore[return-value]


@dataclass(frozen=True)
class Operation(Generic[Function]):
    """An operation with its implementations."""

    name: str
    """The field of `isthmus.model.ops.kernels.Kernels` that holds the choice"""
    reference: Function
    kernels: tuple[Kernel[Function], ...] = ()
    """In the order in which "auto" tries them"""
    is_used: Callable[[Setting], bool] = lambda setting: True
    """Whether work like this calls the operation at all"""

    def __getitem__(self, implementation: str) -> Function:
        """The implementation of that name. Raises KeyError where there is none."""
        return {REFERENCE: self.reference, **{kernel.name: kernel.run for kernel in self.kernels}}[implementation]

    def choose(self, wish: str, setting: Setting) -> str:
        """The name of the implementation that `wish` gives: "auto", "reference", or a kernel's name, which leaves an
        operation without a kernel of that name with its reference. Raises ConfigError where that kernel can't run."""
        if wish == AUTO:
            wanted = (kernel for kernel in self.kernels if not (setting.takes_gradients and kernel.trains_by_name))
            return next((kernel.name for kernel in wanted if kernel.why_not(setting) is None), REFERENCE)
        kernel = next((kernel for kernel in self.kernels if kernel.name == wish), None)
        if kernel is None:
            return REFERENCE
        if reason := kernel.why_not(setting):
            raise ConfigError(f"kernels={wish} can't compute {self.name}: {reason}; kernels={AUTO} takes what can run")
        return kernel.name

    def refusals(self, setting: Setting) -> dict[str, str]:
        """Why the kernels of the setting's platform can't run there, by name; nothing for those that can."""
        mine = (kernel for kernel in self.kernels if setting.platform in kernel.platforms)
        return {kernel.name: reason for kernel in mine if (reason := kernel.why_not(setting))}
