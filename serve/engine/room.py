"""Whether a waiting sequence may start, and who has to give way to it for that."""

from __future__ import annotations

from isthmus.serve.engine.holdings import Holdings
from isthmus.serve.engine.running import Running
from isthmus.serve.engine.sequence import Sequence


class Room:
    """Slots and pages for those that wait. It changes nothing."""

    def __init__(self, holdings: Holdings, running: Running) -> None:
        self._holdings, self._running = holdings, running

    def victims(self, sequence: Sequence, hit: list[int], *, reserved: bool) -> list[Sequence] | None:
        """The running sequences to preempt so that a waiting one may start from the cached pages of `hit`: none where a
        slot and pages are free. None if it must wait. reserved: whether free pages are another's, so that those that it
        takes from victims must do."""
        free = self._holdings.pool.free
        needed = self._holdings.needed(sequence, hit)
        kept = 0 if reserved else self._running.pages_kept(sequence)
        if not reserved and self._holdings.free_slots and needed + kept <= free:
            return []
        short = needed if reserved else needed + kept - free
        victims = []
        for victim in self._running.victims(sequence):
            victims.append(victim)
            short -= self._holdings.pool.freed_by(victim.pages)
            if short <= 0:
                return victims
        return None
