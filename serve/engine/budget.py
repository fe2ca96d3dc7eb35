"""How much of prompts a step computes beside streams: as much as keeps the time between a stream's tokens short,
predicted from how long steps have taken."""

from __future__ import annotations

from isthmus.serve.engine.config import EngineConfig

FACTOR = 4.0
"""Beside prompts a step may take so many times as long as one without them, where no time is given"""
FEWEST = 3
"""Steps that a launch of several has at least: the next one is planned when it is read, which costs time of its own"""
WEIGHT = 0.3
"""The weight of the last step in the moving average that predicts the next one"""


class Budget:
    """Learns what a step takes without prompts, and what each block adds. Blocks further into a long prompt take
    longer, and the engine's other work changes, so what was seen lately counts most."""

    def __init__(self, config: EngineConfig) -> None:
        """config: resolved."""
        self._target = config.target_itl
        self._together = min(config.launch_time, config.target_itl or config.launch_time)
        self._most = config.prefill_tokens // config.block_size
        self._plain: float | None = None
        """Seconds of a step without blocks"""
        self._block: float | None = None
        """Seconds that a block adds"""

    def blocks(self, streams: int) -> int:
        """Most blocks of the next step, in which so many streams get a token: at least one, so that prompts go on."""
        if not streams or not self._plain or not self._block:
            return self._most
        target = self._target or FACTOR * self._plain
        return max(1, min(self._most, int((target - self._plain) / max(self._block, 1e-9))))

    def steps(self) -> int:
        """Most steps without blocks that a launch has, so that tokens don't come later than they would seem to come at
        once."""
        if self._plain is None:
            return 1
        steps = int(self._together / max(self._plain, 1e-9))
        return steps if steps >= FEWEST else 1

    def learn(self, blocks: int, seconds: float) -> None:
        """Takes in what a step with so many blocks took."""
        if blocks == 0:
            self._plain = _mixed(self._plain, seconds)
        else:
            self._block = _mixed(self._block, max(0.0, seconds - (self._plain or 0.0)) / blocks)


def _mixed(before: float | None, now: float) -> float:
    return now if before is None else (1 - WEIGHT) * before + WEIGHT * now
