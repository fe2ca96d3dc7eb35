"""How fast a run is: steps a second, tokens a second, and the share of the machine's peak that they use."""

from __future__ import annotations

import dataclasses
import time

import jax

from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.device.hardware import measure_gemm, peak_flops
from isthmus.model.parameter import Role
from isthmus.model.transformer import parameter_specs

REMEASURE_SECONDS = 60.0
"""A peak that was measured here is measured again in a pause, this long after the last time."""


class Speed:
    """The time that steps took, without what ran between them. A window is what is logged as one figure."""

    def __init__(self, tokens: int, flops: int, dtype: str, devices: int) -> None:
        """tokens, flops: of a step."""
        self._tokens, self._flops, self._dtype = tokens, flops, dtype
        self.peak, self.source = peak_flops(dtype, devices)
        """FLOP/s, and where from"""
        self._measured = time.perf_counter()
        self._start: float | None = None
        self._first = self._last = 0
        self._now = 0.0
        self._seconds, self._steps = 0.0, 0
        self.rate: float | None = None
        """Steps a second in the last window; in the first one, until now. None before two steps are done"""

    def start(self, step: int) -> None:
        """The clock starts when `step` is done: the one that compiled is no part of the speed."""
        self._start = self._now = time.perf_counter()
        self._first = self._last = step

    def done(self, step: int) -> None:
        """`step` is done."""
        if self._start is None:
            return
        self._now, self._last = time.perf_counter(), step
        if not self._steps and step > self._first:
            self.rate = (step - self._first) / (self._now - self._start)

    def window(self) -> dict[str, float]:
        """Ends a window at the last step that is done: tokens_per_second and mfu, or nothing where it has no step."""
        if self._start is None or self._last == self._first:
            return {}
        seconds, steps = self._now - self._start, self._last - self._first
        self._seconds, self._steps = self._seconds + seconds, self._steps + steps
        self._start, self._first = self._now, self._last
        self.rate = steps / seconds
        # What was reached in the mean can be reached; a single window may be short, and wrong by the host's delays.
        self.peak = max(self.peak, self._steps / self._seconds * self._flops)
        return {"tokens_per_second": self.rate * self._tokens, "mfu": self._mfu(self.rate)}

    def pause(self, seconds: float) -> None:
        """Something else ran for so long since the last step was done."""
        if self._start is not None:
            self._start, self._now = self._start + seconds, self._now + seconds

    def measure_again(self) -> None:
        """In a pause: a peak that was measured while others used the CPUs was too low. An accelerator is ours alone,
        and its memory is full."""
        now = time.perf_counter()
        if self.source == "measured" and jax.default_backend() == "cpu" and now - self._measured > REMEASURE_SECONDS:
            self.peak = max(self.peak, measure_gemm(self._dtype))
            self._measured = time.perf_counter()

    @property
    def mean(self) -> tuple[float, float]:
        """Tokens a second and MFU over all windows; 0 where no step was measured."""
        rate = self._steps / self._seconds if self._seconds else 0.0
        return rate * self._tokens, self._mfu(rate)

    def _mfu(self, rate: float) -> float:
        return min(1.0, rate * self._flops / self.peak)

    def __str__(self) -> str:
        if self.rate is None:
            return "measuring speed"
        return f"{self.rate * self._tokens:,.0f} tok/s | MFU {self._mfu(self.rate):.1%}"

    def left(self, steps: int) -> str:
        """What `steps` more will take."""
        return "" if self.rate is None else f" | ETA {steps / self.rate:.0f} s"


def step_flops(config: ModelConfig, batch: int, seq: int) -> int:
    """FLOPs of a training step. Under adapters no parameter but theirs has a gradient: a matrix is multiplied by twice,
    not three times."""
    if not config.lora.rank:
        return config.train_flops(batch, seq)
    tokens, attended = batch * seq, batch * seq * (seq + 1) // 2
    plain = dataclasses.replace(config, lora=LoraConfig())
    matrices = plain.forward_flops(tokens, 0)
    attention = plain.forward_flops(tokens, attended) - matrices
    adapters = sum(spec.size for spec in parameter_specs(config).values() if spec.role is Role.ADAPTER)
    return 2 * matrices + 3 * attention + 6 * adapters * tokens
