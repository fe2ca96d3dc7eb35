"""The adapters that an engine has: their names, and their places among the factors that its programs read.

An adapter is loaded into a place that nobody uses, while requests with others run: between two steps, a program writes
its factors there. One that is unloaded takes no new requests; its place is free when the last request that has it has
ended, so a place never changes under a request.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isthmus.errors import ConfigError, FailedPrecondition, ModelNotFound
from isthmus.model.config import ModelConfig
from isthmus.model.ops.cpu.packed import Packed, put_each
from isthmus.model.ops.linear import Weight
from isthmus.model.ops.rounding import narrowed
from isthmus.model.sharding import named_sharding, use_mesh
from isthmus.model.transformer import Params
from isthmus.model.weights.lora import Adapter, in_place, place_specs

KEY_BYTES = hashlib.sha256().digest_size

Factors = Mapping[str, jax.Array]
"""An adapter's factors as `isthmus.model.weights.lora.in_place` makes them, on the devices"""


@dataclass(frozen=True)
class Resident:
    """An adapter in an engine."""

    name: str
    """What requests call it"""
    place: int
    """Which of the engine's adapters it is, from 1 on"""
    key: bytes
    """SHA-256 of all that it computes, by which the prefix cache tells it from others"""
    rank: int = 0
    targets: tuple[str, ...] = ()
    """The projections that it adapts, by their paths in a block"""


class Standing(NamedTuple):
    """How an adapter stands."""

    resident: Resident
    requests: int
    """Those in flight that have it"""
    loaded: bool
    """Whether new requests may have it"""


def residents(adapters: Mapping[str, Adapter]) -> dict[str, Resident]:
    """The adapters by their names, placed in their order."""
    return {name: resident(name, place, each) for place, (name, each) in enumerate(adapters.items(), 1)}


def resident(name: str, place: int, adapter: Adapter) -> Resident:
    return Resident(name, place, key_of(adapter), adapter.lora.rank, tuple(adapter.lora.targets.split("|")))


def key_of(adapter: Adapter) -> bytes:
    """SHA-256 of an adapter's scale and factors."""
    digest = hashlib.sha256(np.float64(adapter.lora.scale).tobytes())
    for path, factor in sorted(adapter.factors.items()):
        digest.update(f"{path} {factor.shape} ".encode())
        digest.update(np.ascontiguousarray(factor).tobytes())
    return digest.digest()


class Adapters(Mapping[str, Resident]):
    """Those that requests may have, by their names, and who has which place. Any thread may read it as a mapping;
    everything else is called with the engine's lock held."""

    def __init__(self, places: int, loaded: Mapping[str, Resident]) -> None:
        """places: how many the engine's network has; 0 if it is served without adapters."""
        self.places = places
        self.coming: dict[int, Factors] = {}
        """By the place: what the engine thread writes there before the next step"""
        self._loaded = dict(loaded)  # replaced as a whole, so that readers need no lock
        self._requests: Counter[Resident] = Counter()

    def __getitem__(self, name: str) -> Resident:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def check(self, asked: Resident | None) -> None:
        """Raises ModelNotFound for an adapter that isn't here, or not in that place. Thread-safe."""
        if asked is not None and self._loaded.get(asked.name) != asked:
            raise ModelNotFound("model", f"the adapter {asked.name!r} is not here")

    def hold(self, asked: Iterable[Resident | None]) -> None:
        """Counts requests in flight by their adapters. Raises as `check`, and counts none then."""
        held = [one for one in asked if one is not None]
        for one in held:
            self.check(one)
        self._requests.update(held)

    def release(self, one: Resident) -> None:
        """A request that had it has ended."""
        self._requests[one] -= 1
        if not self._requests[one]:
            del self._requests[one]

    def release_all(self) -> None:
        """No request is in flight any more."""
        self._requests.clear()

    def standings(self) -> list[Standing]:
        """All that have a place, by their places."""
        loaded = set(self._loaded.values())
        all_of_them = sorted(loaded | set(self._requests), key=lambda one: one.place)
        return [Standing(one, self._requests[one], one in loaded) for one in all_of_them]

    def held(self, name: str, key: bytes) -> Resident | None:
        """The adapter, if its factors are in a place already. Raises FailedPrecondition if the name is another
        adapter's."""
        known = self._loaded.get(name)
        if known is not None and known.key == key:
            return known
        if known is not None:
            raise FailedPrecondition(f"an adapter {name!r} of other weights is loaded: unload it first")
        return next((one for one, _, _ in self.standings() if (one.name, one.key) == (name, key)), None)

    def free_place(self) -> int:
        """A place that holds no adapter. Raises FailedPrecondition if there is none."""
        held = self.standings()
        taken = {standing.resident.place for standing in held}
        free = next((place for place in range(1, self.places + 1) if place not in taken), None)
        if free is None:
            leaving = len(held) - len(self._loaded)
            kept = f", {leaving} of them by requests in flight whose adapters are unloaded" if leaving else ""
            raise FailedPrecondition(
                f"all {self.places} places for adapters are taken{kept}: unload one, or start with more by "
                "engine.max_adapters"
            )
        return free

    def load(self, one: Resident, factors: Factors | None) -> None:
        """Lets requests have an adapter. factors: what its place has to hold; None if it holds that already."""
        if factors is not None:
            self.coming[one.place] = factors
        self._loaded = {**self._loaded, one.name: one}

    def unload(self, name: str) -> Standing:
        """Lets no new request have it. Raises ModelNotFound."""
        if (one := self._loaded.get(name)) is None:
            raise ModelNotFound("name", f"no adapter {name!r:.160} is loaded")
        self._loaded = {other: each for other, each in self._loaded.items() if other != name}
        return Standing(one, self._requests[one], loaded=False)

    def take_coming(self) -> dict[int, Factors]:
        """What is to be written before the next step, by the place."""
        taken, self.coming = self.coming, {}
        return taken


def check_fits(model: ModelConfig, adapter: Adapter) -> None:
    """Raises ConfigError for an adapter that the places in a network can't hold."""
    if adapter.lora.rank > model.lora.rank:
        raise ConfigError(
            f"it has rank {adapter.lora.rank}; the most is {model.lora.rank}, which engine.adapter_rank says where "
            "engine.max_adapters says how many places there are"
        )
    if missing := adapter.factors.keys() - place_specs(model).keys():
        raise ConfigError(
            f"it adapts {min(missing).rpartition('/')[0]}, which those that were given at the start don't: "
            "engine.max_adapters makes places for every projection"
        )


def factors_of(model: ModelConfig, mesh: Mesh, adapter: Adapter) -> Factors:
    """An adapter's factors, which fit, on the devices. Safe to call beside a running engine, on any thread."""
    specs = place_specs(model)
    return {
        path: jax.device_put(factor, named_sharding(mesh, *specs[path].axes[1:]))
        for path, factor in in_place(model, adapter).items()
    }


def held_factors(model: ModelConfig, params: Params) -> Params:
    """Those of parameters, packed or not, that hold the factors of all adapters."""
    paths = place_specs(model)
    return {
        path: weight
        for path, weight in params.items()
        if (weight.names[0] if isinstance(weight, Packed) and weight.names else path) in paths
    }


def write_place(held: Params, place: jax.Array, factors: Factors) -> Params:
    """`held_factors` with an adapter's factors in a place of theirs. place: int32[], from 1 on."""
    return {path: _written(path, weight, place - 1, factors) for path, weight in held.items()}


def _written(path: str, weight: Weight, index: jax.Array, factors: Factors) -> Weight:
    if isinstance(weight, Packed):
        shape = (weight.inputs, weight.outputs)
        return put_each(
            weight, index, jnp.stack([narrowed(factors[name], weight.kind).reshape(shape) for name in weight.names])
        )
    assert isinstance(weight, jax.Array)
    return jax.lax.dynamic_update_index_in_dim(weight, narrowed(factors[path], weight.dtype), index, 0)


def compile_place(model: ModelConfig, mesh: Mesh, params: Params) -> Callable[[Params, np.int32, Factors], Params]:
    """Compiles `write_place`, whose first argument is donated, for abstract parameters."""
    held = held_factors(model, params)
    factors = {
        path: jax.ShapeDtypeStruct(spec.shape[1:], jnp.float32, sharding=named_sharding(mesh, *spec.axes[1:]))
        for path, spec in place_specs(model).items()
    }
    place = jax.ShapeDtypeStruct((), jnp.int32, sharding=named_sharding(mesh))
    with use_mesh(mesh):
        step = jax.jit(write_place, donate_argnums=0, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, held))
        return step.lower(held, place, factors).compile()
