"""The prefix cache: which full pages a sequence can start from, and which it leaves to others.

A page's key is SHA-256(its parent's key, its tokens), and the first page's parent is the root key. So a key stands for
a whole prefix of one root, and nobody finds a page without knowing the root's salt.
"""

from __future__ import annotations

import hashlib

from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.pages import PagePool, page_key
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.sequence import Sequence


def root_key(sequence: Sequence) -> bytes:
    """The parent of a sequence's first page. Sequences share pages only if everything in it is equal: the adapter, the
    salt, and how keys are turned (see ModelConfig.rope_switch)."""
    request, turned = sequence.request, b"long" if sequence.uses_long_rope else b"short"
    adapter = b"\0" if request.adapter is None else b"\1" + request.adapter.key
    return hashlib.sha256(turned + adapter + request.cache_salt).digest()


class PrefixCache:
    """Finds and leaves full pages in a pool. What each sequence may do with it is in its request."""

    def __init__(self, config: EngineConfig, pool: PagePool) -> None:
        """config: resolved."""
        self._pool, self._enabled = pool, config.prefix_cache
        self._page_size, self._block_size = config.page_size, config.block_size
        self._per_block = config.block_size // config.page_size
        self._coming: dict[bytes, Sequence] = {}
        """Keys of blocks that a running sequence has to compute, by their last pages' keys"""

    def find(self, sequence: Sequence) -> list[int]:
        """Pages of a waiting sequence's longest known prefix of whole blocks, which ends before its last token. They
        aren't held yet."""
        if not self._reads(sequence):
            return []
        self._extend_keys(sequence)
        pages = self._pool.lookup(sequence.page_keys)
        return pages[: min(len(pages) // self._per_block, self._most_blocks(sequence)) * self._per_block]

    def start(self, sequence: Sequence) -> None:
        """Tells of the blocks that a sequence, which starts, is going to compute."""
        if self._writes(sequence):
            self._extend_keys(sequence)
            for key in self._block_keys(sequence, sequence.registered // self._per_block):
                self._coming.setdefault(key, sequence)

    def leave(self, sequence: Sequence) -> None:
        """Takes back what `start` told; called while the sequence still has its pages."""
        if self._writes(sequence):
            for key in self._block_keys(sequence, sequence.registered // self._per_block):
                self._computed(key, sequence)

    def is_coming(self, sequence: Sequence, found: int) -> bool:
        """Whether running sequences are computing at least half of what a waiting one misses, of which `found` pages
        are there: it is then worth waiting for. They run, and don't wait for it; and if they end or are preempted, so
        does the wait."""
        if not self._reads(sequence) or not self._coming:
            return False
        first = found // self._per_block
        keys = self._block_keys(sequence, first)[: self._most_blocks(sequence) - first]
        coming = 0
        while coming < len(keys) and keys[coming] in self._coming:
            coming += 1
        missing = sequence.length - found * self._page_size
        return coming > 0 and 2 * coming * self._block_size >= missing

    def register(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Lets others find a running sequence's pages that are full of known tokens and computed by launched steps.

        Where another page has the same prefix already, the sequence goes on with that one and releases its own, which a
        step in flight may still read: whoever writes to it next runs after that step. Returns those changes: (index in
        sequence.pages, page)."""
        full = min(sequence.computed, len(sequence.tokens)) // self._page_size
        if full <= sequence.registered or not self._writes(sequence):
            return []
        self._extend_keys(sequence)
        changes = []
        for index in range(sequence.registered, full):
            own, key = sequence.pages[index], sequence.page_keys[index]
            kept = self._pool.register(own, key)
            if kept != own and self._reads(sequence):
                self._pool.hold([kept])
                self._pool.release([own])
                sequence.pages[index] = kept
                changes.append((index, kept))
            self._computed(key, sequence)
        sequence.registered = full
        return changes

    def forget(self, sequence: Sequence) -> None:
        """Lets nobody find pages with a sequence's prefix any more, because what is in them may be wrong."""
        self._pool.forget(sequence.page_keys)

    def _computed(self, key: bytes, sequence: Sequence) -> None:
        if self._coming.get(key) is sequence:
            del self._coming[key]

    def _reads(self, sequence: Sequence) -> bool:
        """A mean needs the hidden states of all tokens, and the cache has none."""
        request = sequence.request
        return self._enabled and request.cache_read and request.pooling is not Pooling.MEAN

    def _writes(self, sequence: Sequence) -> bool:
        return self._enabled and sequence.request.cache_write

    def _most_blocks(self, sequence: Sequence) -> int:
        """Whole blocks before a sequence's last token, which is always computed: its logits aren't in the cache."""
        return (sequence.length - 1) // self._block_size

    def _block_keys(self, sequence: Sequence, first: int) -> list[bytes]:
        """Keys of the last pages of a sequence's whole blocks from `first` on."""
        return sequence.page_keys[(first + 1) * self._per_block - 1 :: self._per_block]

    def _extend_keys(self, sequence: Sequence) -> None:
        """Extends the sequence's page_keys to all full pages of known tokens."""
        size = self._page_size
        for page in range(len(sequence.page_keys), len(sequence.tokens) // size):
            parent = sequence.page_keys[-1] if sequence.page_keys else root_key(sequence)
            sequence.page_keys.append(page_key(parent, sequence.tokens[page * size : (page + 1) * size]))
