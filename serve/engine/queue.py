"""The sequences that wait, in the order in which they should start.

    priority             the highest first; but a level that was passed over AGEING times goes first once
      preempted          those that had started already, in the order in which they did
      tenants            who was given the fewest tokens goes first
        deadline         of one tenant's, the earliest first, then in the order of arrival

Tenants share by start-time fair queueing (Goyal, Vin and Cheng, 1996): deficit round robin's fairness in tokens without
its rounds, in which a tenant of short requests would wait for a whole quantum of every other one. Each tenant has a
tag, the tokens that it was given on the level's clock. A tenant that comes back goes on from the clock, so that nobody
saves up turns; a sequence costs its prompt and max_tokens, and what of those it didn't draw is given back at its end.

`add`, `put_back`, `take` and `remove` take O(log n) for n waiting sequences, and O(levels) of those that are in use.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator

from isthmus.serve.engine.heap import Heap
from isthmus.serve.engine.sequence import Sequence

AGEING = 16
"""Of L levels with sequences that wait, each starts at least one of any AGEING + L that start"""
_KEPT = 64
"""Tenants without a waiting sequence that a level remembers before it looks for those that it can forget"""


def cost_of(sequence: Sequence) -> int:
    """The tokens that a sequence is charged for when it starts."""
    return sequence.prompt_length + sequence.request.max_tokens


class _Tenant:
    """A tenant's new sequences of one priority."""

    def __init__(self, number: int, tag: int) -> None:
        self.number, self.tag = number, tag
        self.waiting: Heap[Sequence] = Heap()


class _Level:
    """The waiting sequences of one priority."""

    def __init__(self) -> None:
        self.preempted: Heap[Sequence] = Heap()
        self.passed = 0
        """Sequences of other levels that started since one of this level could have"""
        self._tenants: dict[str, _Tenant] = {}
        self._turns: Heap[_Tenant] = Heap()
        """Tenants with new sequences, by their tags"""
        self._clock = 0
        """The tag of the tenant that started a sequence last; the highest one whenever none has a new sequence"""
        self._highest = 0
        self._made, self._sweep_at = 0, _KEPT

    def __bool__(self) -> bool:
        return bool(self.preempted) or bool(self._turns)

    def add(self, sequence: Sequence) -> None:
        if not self._turns:
            self._clock = self._highest
        tenant = self._tenant(sequence.request.tenant)
        deadline = sequence.request.deadline
        tenant.waiting.push(sequence, (math.inf if deadline is None else deadline, sequence.number))
        if tenant not in self._turns:
            tenant.tag = max(tenant.tag, self._clock)
            self._turns.push(tenant, (tenant.tag, tenant.number))

    def remove(self, sequence: Sequence) -> None:
        if sequence in self.preempted:
            self.preempted.remove(sequence)
            return
        tenant = self._tenants[sequence.request.tenant]
        tenant.waiting.remove(sequence)
        if not tenant.waiting:
            self._turns.remove(tenant)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Counts tokens as given to a sequence's tenant; fewer than none are given back."""
        tenant = self._tenant(sequence.request.tenant)
        if tokens > 0:
            self._clock = max(self._clock, tenant.tag)
        tenant.tag += tokens
        self._highest = max(self._highest, tenant.tag)
        if tenant in self._turns:
            tenant.tag = max(tenant.tag, self._clock)
            self._turns.push(tenant, (tenant.tag, tenant.number))

    def candidates(self) -> Iterator[Sequence]:
        if (first := self.preempted.first()) is not None:  # the others after it
            yield first
        ready: list[tuple[int, int, Iterator[Sequence]]] = []
        for tenant in self._turns.in_order():
            while ready and ready[0][:2] < (tenant.tag, tenant.number):
                yield from self._turn(ready)
            heapq.heappush(ready, (tenant.tag, tenant.number, tenant.waiting.in_order()))
        while ready:
            yield from self._turn(ready)

    @staticmethod
    def _turn(ready: list[tuple[int, int, Iterator[Sequence]]]) -> Iterator[Sequence]:
        """The next sequence of the tenant whose turn it is, which then waits for its next turn."""
        tag, number, waiting = heapq.heappop(ready)
        for sequence in waiting:
            yield sequence
            heapq.heappush(ready, (tag + cost_of(sequence), number, waiting))
            return

    def _tenant(self, name: str) -> _Tenant:
        if name not in self._tenants:
            if len(self._tenants) >= self._sweep_at:
                self._forget()
            self._made += 1
            self._tenants[name] = _Tenant(self._made, self._clock)
        return self._tenants[name]

    def _forget(self) -> None:
        """Drops tenants that would start from the clock if they came back."""
        kept = {n: t for n, t in self._tenants.items() if t in self._turns or t.tag > self._clock}
        self._tenants, self._sweep_at = kept, 2 * len(kept) + _KEPT


class Queue:
    """All waiting sequences. It starts nothing: whoever does tells it by `take`."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []
        """The levels' priorities, the lowest first"""
        self._waiting: dict[Sequence, None] = {}
        self._expiries: Heap[Sequence] = Heap()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences in no order."""
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Takes in a sequence that has just arrived."""
        self._arrivals += 1
        sequence.number = self._arrivals
        self._level(sequence).add(sequence)
        self._enter(sequence, self._latest_start(sequence))

    def put_back(self, sequence: Sequence) -> None:
        """Takes in a sequence that was preempted. It goes before new ones of its priority, and only its deadline can
        still end it."""
        self._level(sequence).preempted.push(sequence, sequence.admission)
        self._enter(sequence, sequence.request.deadline)

    def take(self, sequence: Sequence) -> None:
        """Removes a sequence that starts, and charges its tenant for it if it starts for the first time."""
        level = self._level(sequence)
        sequence.stays |= level.passed >= AGEING
        if sequence not in level.preempted:
            level.charge(sequence, cost_of(sequence))
        self.remove(sequence)
        for other in self._levels.values():
            other.passed = other.passed + 1 if other and other is not level else 0

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended."""
        self._level(sequence).remove(sequence)
        del self._waiting[sequence]
        if sequence in self._expiries:
            self._expiries.remove(sequence)

    def settle(self, sequence: Sequence) -> None:
        """Gives a tenant back what its sequence, which was started and has ended, didn't draw."""
        self._level(sequence).charge(sequence, len(sequence.completion) - sequence.request.max_tokens)

    def candidates(self) -> Iterator[Sequence]:
        """The sequences in the order in which they should start, found as far as the caller goes. The queue must not
        change meanwhile."""
        due = [level for level in self._levels.values() if level and level.passed >= AGEING]
        due.sort(key=lambda level: -level.passed)
        for level in due:
            yield from level.candidates()
        for priority in reversed(self._priorities):
            level = self._levels[priority]
            if level and level not in due:
                yield from level.candidates()

    def next_expired(self, now: float) -> Sequence | None:
        """A sequence that must not start any more, which is still in the queue."""
        key = self._expiries.first_key()
        return self._expiries.first() if key is not None and key[0] <= now else None

    def _enter(self, sequence: Sequence, expiry: float | None) -> None:
        self._waiting[sequence] = None
        if expiry is not None:
            self._expiries.push(sequence, (expiry, sequence.number))

    @staticmethod
    def _latest_start(sequence: Sequence) -> float | None:
        request = sequence.request
        if request.max_queue_time is None:
            return request.deadline
        start = request.arrival + request.max_queue_time
        return start if request.deadline is None else min(start, request.deadline)

    def _level(self, sequence: Sequence) -> _Level:
        priority = sequence.request.priority
        if priority not in self._levels:
            self._levels[priority] = _Level()
            bisect.insort(self._priorities, priority)
        return self._levels[priority]
