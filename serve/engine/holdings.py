"""What running sequences hold: a slot each, and pages of the KV cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.pages import PagePool
from isthmus.serve.engine.prefix import PrefixCache
from isthmus.serve.engine.sequence import Sequence
from isthmus.serve.engine.tables import Tables


class Holdings:
    """Gives and takes back slots and pages, and keeps the slots' page tables.

    Whatever is released may be given out at once, also with a step in flight that reads it: whoever writes to it next
    runs after that step on the device.
    """

    def __init__(self, config: EngineConfig, tables: Tables) -> None:
        """config: resolved. tables: each slot's pages, which it writes."""
        self.pool = PagePool(config.pages)
        self.prefixes = PrefixCache(config, self.pool)
        self._config, self._tables = config, tables
        self._free_slots = list(range(config.max_sequences))[::-1]

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def needed(self, sequence: Sequence, hit: list[int]) -> int:
        """Free pages that a waiting sequence takes when it starts from `hit`."""
        return self._pages_for(sequence.length) - len(hit) + self.pool.unheld(hit)

    def start(self, sequence: Sequence, hit: list[int]) -> None:
        """Gives a waiting sequence a slot and pages for all its tokens, of which the first are the cached ones of
        `hit`. There must be as many as `needed` says."""
        self.pool.hold(hit)
        fresh = self.pool.allocate(self._pages_for(sequence.length) - len(hit))
        assert fresh is not None, "admitted without pages"
        sequence.slot = self._free_slots.pop()
        sequence.pages = hit + fresh
        sequence.registered = len(hit)
        sequence.computed = len(hit) * self._config.page_size
        self._tables.write(sequence.slot, 0, sequence.pages)
        self.prefixes.start(sequence)

    def grow(self, sequence: Sequence, tokens: int, *, later: bool = False) -> bool:
        """Gives a sequence pages for `tokens` tokens. Returns False, without a change, if too few are free.

        later: whether the last ones are of later steps of a launch."""
        have = len(sequence.pages)
        if (needed := self._pages_for(tokens) - have) <= 0:
            return True
        fresh = self.pool.allocate(needed)
        if fresh is None:
            return False
        sequence.pages += fresh
        # A single token's page travels with its row, which the first step of a launch has.
        self._tables.write(sequence.slot, have, fresh, place=later or tokens - sequence.computed > 1)
        return True

    def room(self, sequence: Sequence) -> int:
        """How many more tokens a sequence's pages have room for."""
        return len(sequence.pages) * self._config.page_size - sequence.computed

    def register(self, sequence: Sequence) -> None:
        """Lets other sequences find the pages that this one has filled."""
        for index, page in self.prefixes.register(sequence):
            self._tables.write(sequence.slot, index, [page])

    def release(self, sequence: Sequence) -> None:
        """Frees a sequence's pages and its slot."""
        self.prefixes.leave(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.registered = sequence.computed = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._config.page_size)

    def check(self, running: Iterable[Sequence]) -> None:
        """Asserts that each page has as many holders as it counts, and each slot one; this holds at any time."""
        self.pool.check()
        held = np.zeros(self._config.pages, np.int32)
        slots = [*self._free_slots]
        for sequence in running:
            slots.append(sequence.slot)
            assert len(sequence.pages) <= self._config.pages_per_sequence
            assert (self._tables.rows[sequence.slot, : len(sequence.pages)] == sequence.pages).all()
            np.add.at(held, sequence.pages, 1)
        assert (held == self.pool._held).all(), "a page's reference count is not the number of its holders"
        assert sorted(slots) == list(range(self._config.max_sequences)), "a slot is lost or held twice"
