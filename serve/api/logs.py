"""Bounds the log, so that strangers can't fill it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

A_MINUTE = 60.0
MOST = 20
"""Most records of one logger in a minute"""


class Bounded(logging.Filter):
    """Lets a logger's first few records of a minute pass; the next minute's first says how many were left out."""

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        """most: records of one logger in a minute. clock: returns seconds."""
        super().__init__()
        self._most, self._clock = most, clock
        self._minutes: dict[str, tuple[float, int]] = {}
        """By logger, when its minute began, and the records since"""

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        begun, count = self._minutes.get(record.name, (now, 0))
        if now - begun >= A_MINUTE:
            if (left_out := count - self._most) > 0:
                record.msg = f"{record.getMessage()} ({left_out} more records were left out)"
                record.args = ()
            begun, count = now, 0
        self._minutes[record.name] = (begun, count + 1)
        return count < self._most


def bound_logs() -> None:
    """Bounds what the process logs through the root logger's handlers."""
    bounded = Bounded()
    for handler in logging.getLogger().handlers:
        handler.addFilter(bounded)
