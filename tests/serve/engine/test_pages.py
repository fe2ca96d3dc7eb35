"""Pages are never lost, given twice, or evicted while somebody reads them."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from isthmus.serve.engine.pages import NULL_PAGE, PagePool, page_key


def test_a_key_stands_for_the_whole_prefix() -> None:
    """Two pages with the same tokens after different beginnings hold different keys and values."""
    first, other = page_key(b"", [1, 2]), page_key(b"", [1, 3])
    assert first == page_key(b"", [1, 2]) != other
    assert page_key(first, [5, 6]) != page_key(other, [5, 6])
    assert page_key(b"", [1, 2, 3, 4]) != page_key(page_key(b"", [1, 2]), [3, 4])
    assert page_key(b"", [256]) != page_key(b"", [1]) and page_key(b"", [2**31]) != page_key(b"", [-(2**31)])


def test_too_few_pages_change_nothing() -> None:
    """A request that finds no room must not have taken half of it."""
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.free == 3 and pool.in_use == 0
    assert sorted(pool.allocate(3) or []) == [1, 2, 3]
    assert pool.allocate(1) is None and pool.allocate(0) == []
    pool.check()


def test_pages_without_a_prefix_go_first() -> None:
    """A prefix that others may want is evicted only when nothing else is free."""
    pool = PagePool(6)
    kept, plain = pool.allocate(2) or [], pool.allocate(3) or []
    for page, key in zip(kept, (b"a", b"ab"), strict=True):
        pool.register(page, key)
    pool.release(kept)
    pool.release(plain)
    assert set(pool.allocate(3) or []) == set(plain)
    assert pool.lookup([b"a", b"ab"]) == kept
    pool.check()


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    """A beginning serves more prompts than an end, and an old prefix fewer than a new one."""
    pool = PagePool(5)
    old, new = pool.allocate(2) or [], pool.allocate(2) or []
    for page, key in zip(old + new, (b"a", b"ab", b"c", b"cd"), strict=True):
        pool.register(page, key)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.lookup([b"a", b"ab"]) == [old[0]]
    pool.hold([old[0]])  # used again
    pool.release([old[0]])
    assert pool.allocate(2) == [new[1], new[0]]
    assert pool.lookup([b"a"]) == [old[0]]
    pool.check()


def test_a_held_prefix_is_never_evicted() -> None:
    """Somebody reads it."""
    pool = PagePool(3)
    (page,) = pool.allocate(1) or []
    pool.register(page, b"a")
    pool.hold([page])
    pool.release([page])
    assert pool.allocate(2) is None
    pool.check()
    pool.release([page])
    assert len(pool.allocate(2) or []) == 2
    assert pool.lookup([b"a"]) == [] and pool.cached == 0
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations, against a model that is a counter."""

    sequences: Bundle[tuple[int, ...]] = Bundle("sequences")

    @initialize(pages=st.integers(2, 9))
    def start(self, pages: int) -> None:
        self.pool = PagePool(pages)
        self.held: Counter[int] = Counter()
        self.keys: dict[bytes, int] = {}

    @rule(target=sequences, count=st.integers(0, 4))
    def allocate(self, count: int) -> object:
        free = set(range(1, self.pool.pages)) - set(+self.held)
        pages = self.pool.allocate(count)
        if pages is None:
            assert count > len(free)
            return multiple()
        assert len(set(pages)) == count and set(pages) <= free, "a page was given twice"
        self.keys = {key: page for key, page in self.keys.items() if page not in pages}
        self.held.update(pages)
        return tuple(pages)

    @rule(pages=sequences, name=st.integers(0, 5))
    def register(self, pages: tuple[int, ...], name: int) -> None:
        key = bytes([name])
        for page in pages[:1]:
            self.pool.register(page, key)
            if key not in self.keys and page not in self.keys.values():
                self.keys[key] = page

    @rule(target=sequences, names=st.lists(st.integers(0, 5), max_size=3, unique=True))
    def hold(self, names: list[int]) -> tuple[int, ...]:
        wanted = [bytes([name]) for name in names]
        found = [self.keys[key] for key in wanted if key in self.keys]
        missing = next((i for i, key in enumerate(wanted) if key not in self.keys), len(wanted))
        pages = self.pool.lookup(wanted)
        assert pages == found[:missing], "a prefix has no holes"
        assert self.pool.unheld(pages) == sum(self.held[page] == 0 for page in pages)
        self.pool.hold(pages)
        self.held.update(pages)
        return tuple(pages)

    @rule(pages=consumes(sequences))
    def release(self, pages: tuple[int, ...]) -> None:
        self.pool.release(list(pages))
        self.held.subtract(pages)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.in_use == len(+self.held)
        assert self.pool.cached == len(self.keys)
        assert NULL_PAGE not in +self.held
        assert all(self.pool.lookup([key]) == [page] for key, page in self.keys.items())


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPool = PoolMachine.TestCase
