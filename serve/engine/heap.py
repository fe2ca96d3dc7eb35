"""A binary heap whose items can leave from anywhere in it."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Heap(Generic[T]):
    """Items, each once, by keys of which no two are equal: the least comes first. `push` and `remove` take O(log n)."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, T]] = []
        """(key, item); no entry's key is above that of the entries at 2i + 1 and 2i + 2"""
        self._at: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._at

    def __iter__(self) -> Iterator[T]:
        """The items in no order."""
        return iter(self._at)

    def first(self) -> T | None:
        return self._entries[0][1] if self._entries else None

    def first_key(self) -> Any:
        return self._entries[0][0] if self._entries else None

    def push(self, item: T, key: Any) -> None:
        """Adds an item, or moves it to another key."""
        if item in self._at:
            self.remove(item)
        self._entries.append((key, item))
        self._rise(len(self._entries) - 1)

    def remove(self, item: T) -> None:
        index = self._at.pop(item)
        last = self._entries.pop()
        if index < len(self._entries):
            self._entries[index] = last
            self._rise(index)
            self._sink(self._at[last[1]])

    def in_order(self) -> Iterator[T]:
        """The items by their keys, found as far as the caller goes: k of them take O(k log k). The heap must not change
        meanwhile."""
        found = [(self._entries[0][0], 0)] if self._entries else []
        while found:
            _, index = heapq.heappop(found)
            yield self._entries[index][1]
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(self._entries):
                    heapq.heappush(found, (self._entries[child][0], child))

    def _rise(self, index: int) -> None:
        entry = self._entries[index]
        while index and entry[0] < self._entries[(index - 1) // 2][0]:
            self._put(index, self._entries[(index - 1) // 2])
            index = (index - 1) // 2
        self._put(index, entry)

    def _sink(self, index: int) -> None:
        entry, count = self._entries[index], len(self._entries)
        while (child := 2 * index + 1) < count:
            if child + 1 < count and self._entries[child + 1][0] < self._entries[child][0]:
                child += 1
            if not self._entries[child][0] < entry[0]:
                break
            self._put(index, self._entries[child])
            index = child
        self._put(index, entry)

    def _put(self, index: int, entry: tuple[Any, T]) -> None:
        self._entries[index] = entry
        self._at[entry[1]] = index
