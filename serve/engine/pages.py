"""The page pool: who holds which page of the KV cache, and which pages hold a prefix worth keeping.

Page 0 is the null page: padding writes there, and nobody owns it. A page is **held** (reference count > 0) or on the
**free list**; a free page may still be **cached**: keyed by what it holds, ready to be held again until it is evicted.
The free list is intrusive (prev/next in int32 arrays), so that a page leaves its middle in O(1). The page at
its head is evicted next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

NULL_PAGE = 0
_END = -1


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full page: SHA-256 over its parent's key and its tokens, so it stands for the whole prefix."""
    return hashlib.sha256(parent + np.asarray(tokens, np.int64).tobytes()).digest()


class PagePool:
    """A pool of `pages` pages, including the null page."""

    def __init__(self, pages: int) -> None:
        assert pages >= 2, "a pool needs the null page and one more"
        self.pages = pages
        self._held = np.zeros(pages, np.int32)
        self._next = np.arange(1, pages + 1, dtype=np.int32)
        self._prev = np.arange(-1, pages - 1, dtype=np.int32)
        self._next[-1], self._prev[1] = _END, _END
        self._head, self._tail = 1, pages - 1
        self._key_of: list[bytes | None] = [None] * pages
        self._page_of: dict[bytes, int] = {}
        self.free = pages - 1
        """Pages that can be allocated, cached ones included"""

    @property
    def in_use(self) -> int:
        return self.pages - 1 - self.free

    @property
    def cached(self) -> int:
        """Pages with a key, held or free."""
        return len(self._page_of)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, each held once; evicts the least recently used prefixes. None, and no change, if too few."""
        if count > self.free:
            return None
        pages = []
        for _ in range(count):
            page = self._head
            self._unlink(page)
            self._forget(page)
            self._held[page] = 1
            pages.append(page)
        return pages

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """The cached pages of the longest known prefix of `keys`; they are not held yet."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def unheld(self, pages: Sequence[int]) -> int:
        """How many of `pages` are on the free list."""
        return int((self._held[list(pages)] == 0).sum()) if pages else 0

    def freed_by(self, pages: Sequence[int]) -> int:
        """How many of `pages`, which somebody holds, are free once they are released."""
        return int((self._held[list(pages)] == 1).sum()) if pages else 0

    def hold(self, pages: Sequence[int]) -> None:
        """Adds a holder to each of these cached pages."""
        for page in pages:
            if self._held[page] == 0:
                self._unlink(page)
            self._held[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Releases a sequence's `pages`, in its order. Its end is evicted before its beginning, which may be shared."""
        for page in reversed(pages):
            assert page != NULL_PAGE and self._held[page] > 0, f"page {page} released and not held"
            self._held[page] -= 1
            if self._held[page] == 0:
                self._link(page, at_head=self._key_of[page] is None)

    def register(self, page: int, key: bytes) -> int:
        """Remembers that `page`, held and full, holds the prefix of `key`. Returns the page that is known for it: the
        first one with a key keeps it."""
        assert self._held[page] > 0, f"page {page} registered and not held"
        if key not in self._page_of and self._key_of[page] is None:
            self._key_of[page] = key
            self._page_of[key] = page
        return self._page_of.get(key, page)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Lets nobody find the pages with these keys any more."""
        for key in keys:
            if key in self._page_of:
                self._forget(self._page_of[key])

    def _forget(self, page: int) -> None:
        key = self._key_of[page]
        if key is not None:
            del self._page_of[key]
            self._key_of[page] = None

    def _unlink(self, page: int) -> None:
        before, after = int(self._prev[page]), int(self._next[page])
        if before == _END:
            self._head = after
        else:
            self._next[before] = after
        if after == _END:
            self._tail = before
        else:
            self._prev[after] = before
        self.free -= 1

    def _link(self, page: int, *, at_head: bool) -> None:
        if self.free == 0:
            self._head = self._tail = page
            self._prev[page] = self._next[page] = _END
        elif at_head:
            self._prev[page], self._next[page] = _END, self._head
            self._prev[self._head] = page
            self._head = page
        else:
            self._prev[page], self._next[page] = self._tail, _END
            self._next[self._tail] = page
            self._tail = page
        self.free += 1

    def check(self) -> None:
        """Asserts every invariant of this class; O(pages), for tests."""
        listed, page, before = [], self._head if self.free else _END, _END
        while page != _END:
            assert self._prev[page] == before, f"page {page}: prev is {self._prev[page]}, not {before}"
            listed.append(page)
            assert len(listed) <= self.pages, "the free list has a cycle"
            before, page = page, int(self._next[page])
        assert len(listed) == self.free == len(set(listed)), "free count and free list differ"
        assert NULL_PAGE not in listed and self._held[NULL_PAGE] == 0, "the null page has an owner"
        unheld = set(np.flatnonzero(self._held == 0).tolist()) - {NULL_PAGE}
        assert unheld == set(listed), "a page is neither held nor free, or both"
        assert (self._held >= 0).all(), "a negative reference count"
        for key, page in self._page_of.items():
            assert self._key_of[page] == key, f"page {page} and its key disagree"
        assert sum(key is not None for key in self._key_of) == len(self._page_of), "a key without a page"
