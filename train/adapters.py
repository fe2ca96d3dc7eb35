"""What differs when only adapters are trained: where they start, how a checkpoint holds them, what a step costs."""

from __future__ import annotations

import dataclasses
import math

import jax
from flax import nnx
from jax.sharding import Mesh

from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.device.compilation import same_bits
from isthmus.model.sharding import use_mesh
from isthmus.model.transformer import Params, Transformer, abstract_params, stacked, unstack_blocks
from isthmus.model.weights import lora


def init_adapters(config: ModelConfig, seed: int, mesh: Mesh) -> Params:
    """Adapters as a random network has them, without the network. The same seed gives the same values on any mesh,
    scanned or not; none changes anything yet."""

    def create(key: jax.Array) -> Params:
        with nnx.use_eager_sharding(False):
            state = nnx.state(Transformer(stacked(config), nnx.Rngs(key)))
        adapters = lora.split(nnx.to_pure_dict(state))[1]  # what isn't returned is never computed
        return adapters if config.scan_layers else unstack_blocks(adapters)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, lora.split(abstract_params(config, mesh))[1])
    with use_mesh(mesh):
        return jax.jit(create, out_shardings=shardings, compiler_options=same_bits(mesh))(jax.random.key(seed))


def step_flops(config: ModelConfig, batch: int, seq: int) -> int:
    """FLOPs of a training step. Under adapters no parameter but theirs has a gradient: a matrix is multiplied by twice,
    not three times."""
    if not config.lora.rank:
        return config.train_flops(batch, seq)
    tokens, attended = batch * seq, batch * seq * (seq + 1) // 2
    plain = dataclasses.replace(config, lora=LoraConfig())
    matrices = plain.forward_flops(tokens, 0)
    attention = plain.forward_flops(tokens, attended) - matrices
    adapters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(lora.split(abstract_params(config))[1]))
    return 2 * matrices + 3 * attention + 6 * adapters * tokens
