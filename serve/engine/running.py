"""The sequences that run, who of them gives way to whom, and how many pages they may still need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.heap import Heap
from isthmus.serve.engine.sequence import Sequence

MOST_PREEMPTIONS = 3
"""A sequence that was preempted so often isn't preempted again for pages: see `Running.pages_kept`"""
SHARE_KEPT = 4
"""One page of so many that a running sequence may still need is kept free for it"""
QUIET = 2
"""A tenant is quiet beside one that runs more than so many times as many sequences"""


class Running:
    """Running sequences. All but `victims` and `pages_kept` take O(log n) at most."""

    def __init__(self, config: EngineConfig) -> None:
        """config: resolved."""
        self._page_size = config.page_size
        self._sequences: dict[Sequence, None] = {}
        self._last: Heap[Sequence] = Heap()
        """The one to be preempted first is the first"""
        self._tenants: Counter[str] = Counter()
        self._admissions = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences in the order in which they were given their slots."""
        return iter(self._sequences)

    def start(self, sequence: Sequence) -> None:
        if not sequence.admission:
            self._admissions += 1
            sequence.admission = self._admissions
        self._sequences[sequence] = None
        self._last.push(sequence, (sequence.request.priority, -sequence.admission))
        self._tenants[sequence.request.tenant] += 1

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence]
        self._last.remove(sequence)
        self._tenants[sequence.request.tenant] -= 1
        if not self._tenants[sequence.request.tenant]:
            del self._tenants[sequence.request.tenant]

    def last(self) -> Sequence:
        """The one to preempt if there is no page left: the newest of the lowest priority. So the oldest of the highest
        always goes on, and all end at last."""
        last = self._last.first()
        assert last is not None, "nothing runs"
        return last

    def gives_way(self, sequence: Sequence, candidate: Sequence) -> bool:
        """Whether a running sequence leaves room for one that waits: for one of a higher priority, or of a tenant that
        is quiet beside its own."""
        ours, theirs = sequence.request, candidate.request
        if ours.priority != theirs.priority:
            return ours.priority < theirs.priority
        return self._tenants[ours.tenant] > QUIET * self._tenants[theirs.tenant] and ours.tenant != theirs.tenant

    def victims(self, candidate: Sequence) -> Iterator[Sequence]:
        """Those that a sequence may take slot and pages from in order to start, in the order in which it should. Each
        gives way at most once, and not at all if it started because its level had waited too long, so that a stream of
        newcomers can't keep it from its end."""
        own, most = self._tenants[candidate.request.tenant], max(self._tenants.values(), default=0)
        if not self._sequences or (most <= QUIET * own and self.last().request.priority >= candidate.request.priority):
            return
        for sequence in self._last.in_order():
            if not (sequence.stays or sequence.preemptions) and self.gives_way(sequence, candidate):
                yield sequence

    def turn(self, sequence: Sequence) -> tuple[int, int, int]:
        """Sorts running sequences by whose prompt goes on first."""
        request = sequence.request
        return -request.priority, self._tenants[request.tenant], sequence.admission

    def pages_kept(self, candidate: Sequence) -> int:
        """Free pages that are to be left when a sequence starts, for it and those that run to grow into.

        A share of what they need if each draws max_tokens, because most end earlier. As soon as one of them was
        preempted MOST_PREEMPTIONS times it is all of it; no page can be missing then while that one runs. So a sequence
        is computed at most MOST_PREEMPTIONS times again, apart from a change of its frequencies."""
        if not self._sequences:
            return 0
        everyone = (*self._sequences, candidate)
        whole = max(sequence.preemptions for sequence in everyone) >= MOST_PREEMPTIONS
        share = 1 if whole else SHARE_KEPT
        return sum([-(-self._pages_to_end(sequence) // share) for sequence in everyone])

    def _pages_to_end(self, sequence: Sequence) -> int:
        """The pages that a sequence needs beyond those it has, or would start with, to draw max_tokens."""
        have = len(sequence.pages) or -(-sequence.length // self._page_size)
        return -(-(sequence.prompt_length + sequence.request.max_tokens) // self._page_size) - have
