"""The page tables, as the host knows them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus.serve.engine.config import EngineConfig


class Tables:
    """Each slot's pages, and which of them the device doesn't have yet."""

    def __init__(self, config: EngineConfig) -> None:
        """config: resolved."""
        self.rows = np.zeros((config.max_sequences, config.pages_per_sequence), np.int32)
        """int32[max_sequences, pages_per_sequence]"""
        self._stale: set[int] = set()

    def write(self, slot: int, first: int, pages: Sequence[int], *, place: bool = True) -> None:
        """Writes pages of a slot from index `first` on. place: whether the device is to get them with the next step."""
        self.rows[slot, first : first + len(pages)] = pages
        if place:
            self._stale.add(slot)

    def take_stale(self) -> list[tuple[int, np.ndarray]]:
        """(slot, its pages) of all that have changed since the last call."""
        stale = [(slot, self.rows[slot].copy()) for slot in sorted(self._stale)]
        self._stale.clear()
        return stale
