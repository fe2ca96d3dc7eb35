"""Random parameters, from which training starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import Mesh

from isthmus.model.config import ModelConfig
from isthmus.model.device.compilation import same_bits
from isthmus.model.execution import Execution
from isthmus.model.ops.rounding import narrowed
from isthmus.model.sharding import use_mesh
from isthmus.model.transformer import Params, Transformer, abstract_params, by_path
from isthmus.model.weights.layout import is_stacked, unstack_params
from isthmus.model.weights.load import Read, load_params


@dataclass(frozen=True)
class RandomSource:
    """A source of random parameters. The same seed gives the same values on any mesh and in either layout, whether all
    parameters are requested or only some. Parameters that aren't requested are never computed."""

    config: ModelConfig
    seed: int
    mesh: Mesh
    nbytes: int = 0

    def reads(self, abstract: Params) -> Iterator[Read]:
        """Yields a single read. One program creates all parameters, each directly in its shards."""
        yield Read(0, lambda: self._create(abstract))

    def _create(self, abstract: Params) -> Params:
        stacked = any(map(is_stacked, abstract))

        def create(key: jax.Array) -> Params:
            with nnx.use_eager_sharding(False):
                state = nnx.state(Transformer(self.config, Execution(scan_layers=True), nnx.Rngs(key)))
            params = {path: variable.get_value() for path, variable in by_path(state).items()}
            params = params if stacked else unstack_params(params)
            return {path: narrowed(params[path], leaf.dtype) for path, leaf in abstract.items()}

        shardings = {path: leaf.sharding for path, leaf in abstract.items()}
        with use_mesh(self.mesh):
            program = jax.jit(create, out_shardings=shardings, compiler_options=same_bits(self.mesh))
            return program(jax.random.key(self.seed))


def init_params(
    config: ModelConfig, seed: int, mesh: Mesh, *, stacked: bool = False, dtype: str | None = None
) -> Params:
    """Returns random parameters of a network, in either layout. dtype: as in `abstract_params`."""
    abstract = abstract_params(config, mesh, stacked=stacked, dtype=dtype)
    return load_params(RandomSource(config, seed, mesh), abstract)
