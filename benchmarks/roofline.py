"""The least time that a step can take, by the bytes that it must move, the FLOPs that it must compute, and the
machine's limits.

This is the roofline of Williams, Waterman and Patterson (2009, doi 10.1145/1498765.1498785). Bytes and FLOPs are
counted from shapes, not from what the program really moves: the distance between the two is what can be gained.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from isthmus.model.config import ModelConfig
from isthmus.model.device.hardware import Limits
from isthmus.model.parameter import Role
from isthmus.model.transformer import parameter_specs
from isthmus.serve.engine.config import Bucket, EngineConfig


@dataclass(frozen=True)
class StepWork:
    """The work of a step: rows that decode, and prompts from their first token."""

    rows: int
    """Sequences that each draw one token"""
    depth: int
    """Positions that this token attends to, its own included"""
    prompts: tuple[int, ...]
    """Tokens of each prompt"""

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return self.rows + sum(self.prompts)

    @property
    def drawn(self) -> int:
        """Rows of logits that are needed: one for each sequence."""
        return self.rows + len(self.prompts)

    @property
    def read(self) -> int:
        """Cached positions that must be read: each sequence's once, however many of its queries attend to them."""
        return self.rows * self.depth + sum(self.prompts)

    @property
    def attended(self) -> int:
        """Pairs of a query and a key."""
        return self.rows * self.depth + sum(p * (p + 1) // 2 for p in self.prompts)


def workload(bucket: Bucket, depth: int) -> StepWork:
    """The work that fills a bucket as far as an engine with a slot for each row can: blocks hold prompts of up to
    `depth` tokens, in whole blocks, and a row for each slot that is left decodes at `depth`."""
    per_prompt = max(1, depth // bucket.block_size)
    whole, rest = divmod(bucket.blocks, per_prompt)
    blocks = ([per_prompt] * whole + [rest] * bool(rest))[: bucket.rows]
    return StepWork(bucket.rows - len(blocks), depth, tuple(count * bucket.block_size for count in blocks))


@dataclass(frozen=True)
class Cost:
    """The least that a step has to move and to compute."""

    weight_bytes: int
    """Every parameter once; of an embedding that isn't the head, only the rows looked up"""
    kv_read_bytes: int
    kv_written_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes


def weight_bytes(config: ModelConfig, tokens: int, dtype: str) -> int:
    """Bytes of parameters that a step over `tokens` tokens reads, as serving in `dtype` keeps them."""
    total = 0
    for spec in parameter_specs(config).values():
        only_looked_up = spec.role is Role.EMBEDDING and not config.tie_embeddings
        numbers = min(tokens, config.vocab_size) * config.dim if only_looked_up else spec.size
        total += numbers * jnp.dtype(spec.storage_dtype(dtype)).itemsize
    return total


def cost(config: ModelConfig, work: StepWork, dtype: str) -> Cost:
    """The cost of a step. FLOPs are ModelConfig.forward_flops, less the head's for tokens that draw nothing; bytes are
    those of a model and a cache in `dtype`."""
    token_bytes = EngineConfig().kv_bytes_per_token(config, dtype)
    headless = 2 * config.vocab_size * config.dim * (work.tokens - work.drawn)
    return Cost(
        weight_bytes=weight_bytes(config, work.tokens, dtype),
        kv_read_bytes=work.read * token_bytes,
        kv_written_bytes=work.tokens * token_bytes,
        flops=config.forward_flops(work.tokens, work.attended) - headless,
    )


def limit_seconds(cost: Cost, limits: Limits) -> tuple[float, str]:
    """The least time, and which limit sets it: 'memory' or 'compute'."""
    memory, compute = cost.bytes / limits.bandwidth, cost.flops / limits.flops
    return (memory, "memory") if memory >= compute else (compute, "compute")
