"""Chooses the implementation of each operation of a network, once, when an engine or a trainer is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.ops.attention import ATTENTION
from isthmus.model.ops.flag import FLAG
from isthmus.model.ops.gated import GATED
from isthmus.model.ops.grouped_matmul import GROUPED_MATMUL
from isthmus.model.ops.linear import LINEAR
from isthmus.model.ops.log_probability import LOG_PROBABILITY
from isthmus.model.ops.lora import LORA
from isthmus.model.ops.norm import NORM
from isthmus.model.ops.operation import AUTO, REFERENCE, Operation, Setting
from isthmus.model.ops.paged_attention import PAGED_ATTENTION
from isthmus.model.ops.rotary import ROTARY
from isthmus.model.ops.routing import ROUTING
from isthmus.model.ops.sampling import SAMPLING

OPERATIONS: tuple[Operation[Any], ...] = (
    LINEAR,
    ATTENTION,
    PAGED_ATTENTION,
    NORM,
    ROTARY,
    GATED,
    ROUTING,
    GROUPED_MATMUL,
    LORA,
    SAMPLING,
    FLAG,
    LOG_PROBABILITY,
)


@dataclass(frozen=True)
class Kernels:
    """The name of the implementation that each operation takes."""

    linear: str = REFERENCE
    """Products with matrices: model/ops/linear.py"""
    attention: str = REFERENCE
    """Attention over whole sequences, as in training: model/ops/attention.py"""
    paged_attention: str = REFERENCE
    """Attention over the paged cache, as in serving: model/ops/paged_attention.py"""
    norm: str = REFERENCE
    rotary: str = REFERENCE
    gated: str = REFERENCE
    """The hidden layer of a gated MLP: model/ops/gated.py"""
    routing: str = REFERENCE
    """The scores of a mixture's experts: model/ops/routing.py"""
    grouped_matmul: str = REFERENCE
    """Products with the matrices of experts, and of latent attention's heads: model/ops/grouped_matmul.py"""
    lora: str = REFERENCE
    """What each token's own adapter adds to a product, in serving: model/ops/lora.py"""
    sampling: str = REFERENCE
    """Drawing tokens from logits, in serving: model/ops/sampling.py"""
    flag: str = REFERENCE
    """Whether the host wants a launch of several steps to end, in serving: model/ops/flag.py"""
    log_probability: str = REFERENCE
    """The log-probabilities of tokens that are known, in training: model/ops/log_probability.py"""

    @property
    def packs_weights(self) -> bool:
        """Whether matrices are to be laid out for the CPU's kernel (`isthmus.model.weights.packing`)."""
        return self.linear == "cpu"


REFERENCES = Kernels()
"""The reference of every operation: what runs everywhere and has a gradient."""


def choose(wish: str, setting: Setting) -> Kernels:
    """The implementations that `wish` gives: "auto", "reference" or the name of kernels for all operations, and after
    it, with commas, what single operations take instead, as in "auto,linear=reference".

    Raises ConfigError where it names what there isn't, or kernels that can't run there.
    """
    wishes = _wishes(wish)
    return Kernels(**{each.name: each.choose(wishes[each.name], setting) for each in _used(setting)})


def _wishes(wish: str) -> dict[str, str]:
    """What is wished for each operation. Raises ConfigError."""
    general, *parts = (part.strip() for part in wish.split(","))
    named = [kernel.name for each in OPERATIONS for kernel in each.kernels]
    of_several = bool(parts) or "=" in general
    _check_is_one(general, [AUTO, REFERENCE, *named], f"kernels={wish}", of_several=of_several)
    single: dict[str, str] = {}
    for part in parts:
        name, implementation = (each.strip() for each in part.partition("=")[::2])
        _check_is_one(name, [each.name for each in OPERATIONS], f"kernels={wish}", of_several=True)
        operation = next(each for each in OPERATIONS if each.name == name)
        names = [AUTO, REFERENCE, *(kernel.name for kernel in operation.kernels)]
        _check_is_one(implementation, names, f"kernels={wish}: {name}=", of_several=False)
        if name in single:
            raise ConfigError(f"kernels={wish} names {name} twice")
        single[name] = implementation
    return {each.name: single.get(each.name, general) for each in OPERATIONS}


def _check_is_one(name: str, names: Sequence[str], where: str, *, of_several: bool) -> None:
    if name not in names:
        which = f": {name!r}" if of_several else ""
        raise ConfigError(f"{where}{which} must be one of {', '.join(dict.fromkeys(names))}")


def announcement(kernels: Kernels, setting: Setting) -> str:
    """A line that says which implementation each operation of this work takes, as in "kernels: cpu" where they are one,
    or "kernels: linear cpu, norm reference"."""
    taken = {operation.name: getattr(kernels, operation.name) for operation in _used(setting)}
    one, *others = dict.fromkeys(taken.values())
    return f"kernels: {', '.join(f'{name} {taken[name]}' for name in taken) if others else one}"


def fallbacks(kernels: Kernels, setting: Setting, wish: str = AUTO) -> list[str]:
    """For each reason why operations take the reference where their platform has kernels, a line that names them; not
    those for which `wish` was another than "auto"."""
    operations: dict[tuple[str, str], list[str]] = {}
    wishes = _wishes(wish)
    for operation in _used(setting):
        if getattr(kernels, operation.name) == REFERENCE and wishes[operation.name] == AUTO:
            for refusal in operation.refusals(setting).items():
                operations.setdefault(refusal, []).append(operation.name)
    return [f"without the {name} kernels of {', '.join(of)}: {why}" for (name, why), of in operations.items()]


def _used(setting: Setting) -> list[Operation[Any]]:
    return [operation for operation in OPERATIONS if operation.is_used(setting)]
