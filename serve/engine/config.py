"""The engine's sizes, and the static shapes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig


class Bucket(NamedTuple):
    """A step's static shape: a flat axis of `rows` single tokens, then `blocks` blocks of prefill tokens."""

    rows: int
    blocks: int
    block_size: int
    ends: int = 0
    """Most prompts that may end in it. It is the same with few blocks as with many, so that they share their draws"""

    @property
    def tokens(self) -> int:
        return self.rows + self.blocks * self.block_size

    @property
    def samples(self) -> int:
        """Rows of logits: each single token may draw the next one, and so may the end of each prompt."""
        return self.rows + self.ends


MOST = {
    "max_sequences": 1 << 13,
    "page_size": 1 << 12,
    "prefill_tokens": 1 << 17,
    "block_size": 1 << 12,
    "max_waiting": 1 << 20,
    "adapter_rank": 1 << 10,
}
"""The largest sizes that an engine takes. Beyond them a slip of the pen would compile for hours."""


MOST_ADAPTERS = 1 << 10
MOST_STEPS = 1 << 6
LOOPED_ROWS = 4
"""Rows of a step up to which several are launched at once: with more, a step takes long beside the host's work"""
MOST_HISTORY = 1 << 26


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine holds, and how its work is divided into steps."""

    max_sequences: int = 32
    """Most sequences that run at once; further ones wait"""
    context_length: int = 0
    """Most tokens of prompt and completion together; 0 takes the model's, or what memory has room for"""
    pages: int = 0
    """Pages of KV cache; 0 makes room for max_sequences at half the context, or for what fits into memory"""
    page_size: int = 16
    """Tokens in a page of KV cache"""
    prefill_tokens: int = 512
    """Most prompt tokens in a step; beside streams fewer, as target_itl says"""
    target_itl: float = 0.0
    """Seconds between a stream's tokens that a step aims at while it computes prompts beside streams; 0 aims at four
    times what a step without prompts takes. However long that takes, a step computes one block of a prompt"""
    block_size: int = 32
    """Prompt tokens in a block, which attend together; a multiple of page_size. Prompts are cached by whole blocks"""
    draft_rows: int = 8
    """Rows of a step without prompts up to which it checks drafts: guesses of what comes next where a text repeats an
    earlier place or answer (speculative decoding). Texts are the same either way; 0 makes none"""
    draft_history: int = 1 << 18
    """Tokens of answers that are kept for drafts of later ones, of which a caller, salt and adapter have an eighth at
    most; 50 to 260 bytes each. 0 keeps none, and so do prefix_cache off and draft_rows 0"""
    steps_per_launch: int = 8
    """Most steps that are launched at once while no request waits, at most 4 sequences run and none has rules for its
    next token, which spares a small model the host's work; no more than take launch_time. A request that comes or is
    cancelled ends the launch, on a CPU at once. 1 launches each step alone"""
    launch_time: float = 0.04
    """Most seconds that a launch of several steps takes, whose tokens come together; target_itl, if that is shorter"""
    max_waiting: int = 256
    """Most requests in flight beyond max_sequences; further ones are refused"""
    prefix_cache: bool = True
    """Keep the pages of finished requests for later prompts with the same beginning"""
    max_adapters: int = 0
    """Places for LoRA adapters, each of adapter_rank and for every projection; 0 is exactly those that are given at the
    start, each projection that one of them adapts at the largest of their ranks"""
    adapter_rank: int = 16
    """Largest rank of an adapter where max_adapters says how many there may be"""
    cache_dtype: Literal["model", "float32", "bfloat16", "int8"] = "model"
    """The dtype of keys and values; model is the dtype that the model runs in. int8 has a float32 scale for every 64
    numbers of a head"""

    def resolve(self, model: ModelConfig) -> EngineConfig:
        """These sizes with every 0 replaced by its default. Raises ConfigError naming the field that can't work."""
        import dataclasses

        if not 0 <= self.target_itl <= 3600:
            raise ConfigError(f"engine.target_itl={self.target_itl} must be 0 to 3600 seconds")
        if not 0 < self.launch_time <= 3600:
            raise ConfigError(f"engine.launch_time={self.launch_time} must be more than 0, to 3600 seconds")
        if not 0 <= self.draft_rows <= MOST["max_sequences"]:
            raise ConfigError(f"engine.draft_rows={self.draft_rows} must be 0 to {MOST['max_sequences']}")
        if not 1 <= self.steps_per_launch <= MOST_STEPS:
            raise ConfigError(f"engine.steps_per_launch={self.steps_per_launch} must be 1 to {MOST_STEPS}")
        if not 0 <= self.draft_history <= MOST_HISTORY:
            raise ConfigError(f"engine.draft_history={self.draft_history} must be 0 to {MOST_HISTORY}")
        if not 0 <= self.max_adapters <= MOST_ADAPTERS:
            raise ConfigError(f"engine.max_adapters={self.max_adapters} must be 0 to {MOST_ADAPTERS}")
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"engine.{name}={getattr(self, name)} must be 1 to {most}")
        context = self.context_length or model.context_length
        if not 2 <= context <= model.context_length:
            raise ConfigError(f"engine.context_length={context} must be 2 to the model's {model.context_length}")
        if self.block_size % self.page_size:
            raise ConfigError(f"engine.block_size={self.block_size} must be a multiple of page_size={self.page_size}")
        if self.prefill_tokens % self.block_size:
            raise ConfigError(
                f"engine.prefill_tokens={self.prefill_tokens} must be a multiple of block_size={self.block_size}"
            )
        whole = -(-context // self.page_size)
        pages = self.pages or 1 + max(whole, self.max_sequences * whole // 2)
        if pages < 1 + whole:
            raise ConfigError(f"engine.pages={pages} must be at least {1 + whole}: the null page and one whole context")
        return dataclasses.replace(self, context_length=context, pages=pages)

    @property
    def nobody(self) -> int:
        """The slot that stands for padding, after those of sequences."""
        return self.max_sequences

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context_length // self.page_size)

    def kv_bytes_per_token(self, model: ModelConfig, dtype: str) -> int:
        """Bytes of KV cache that a token takes, all layers together, of a model that runs in `dtype`."""
        from isthmus.model.ops.paged_cache import scales_of

        kept = self.cache_dtype if self.cache_dtype != "model" else dtype
        size = model.head_dim
        vector = {"float32": 4 * size, "bfloat16": 2 * size, "int8": size + 4 * scales_of(size)}[kept]
        return model.layers * model.cache_heads * vector

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every shape of a step: powers of two of rows without blocks, then a row for each sequence with powers of two
        of blocks."""
        most_blocks = self.prefill_tokens // self.block_size
        rows = max(self.max_sequences, self.draft_rows)
        decode = [Bucket(rows, 0, self.block_size) for rows in _powers(rows)]
        ends = min(most_blocks, self.max_sequences)
        mixed = [Bucket(self.max_sequences, blocks, self.block_size, ends) for blocks in _powers(most_blocks)]
        return (*decode, *mixed)

    @cached_property
    def loops(self) -> tuple[Bucket, ...]:
        """The buckets of which several steps may be launched at once."""
        if self.steps_per_launch == 1:
            return ()
        most = self.bucket(min(LOOPED_ROWS, self.max_sequences), 0).rows
        return tuple(bucket for bucket in self.buckets if not bucket.blocks and bucket.rows <= most)

    def bucket(self, rows: int, blocks: int, steps: int = 1) -> Bucket:
        """The smallest bucket with room for so many rows and blocks, of those of which several steps may be launched if
        there are."""
        return next(b for b in (self.loops if steps > 1 else self.buckets) if b.rows >= rows and b.blocks >= blocks)


def _powers(limit: int) -> list[int]:
    sizes = []
    size = 1
    while size < limit:
        sizes.append(size)
        size *= 2
    return [*sizes, limit]
