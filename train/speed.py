"""How fast a run is: steps per second, tokens per second, and the share of the machine's peak FLOP/s that it uses."""

from __future__ import annotations

import dataclasses
import time

import jax

from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.device.hardware import measure_gemm, peak_flops
from isthmus.model.parameter import Role
from isthmus.model.transformer import parameter_specs

REMEASURE_SECONDS = 60.0
"""A measured peak is measured again in the first pause that is at least this long after the last measurement."""


class Speed:
    """The time that steps took, without what ran between them. A window is the steps that are logged as one figure."""

    def __init__(self, tokens: int, flops: int, dtype: str, devices: int) -> None:
        """tokens, flops: those of one step."""
        self._tokens, self._flops, self._dtype = tokens, flops, dtype
        self.peak, self.source = peak_flops(dtype, devices)
        """Peak FLOP/s, and where it is from: 'data sheet' or 'measured'"""
        self._measured = time.perf_counter()
        self._start: float | None = None
        self._first = self._last = 0
        self._now = 0.0
        self._seconds, self._steps = 0.0, 0
        self.rate: float | None = None
        """Steps per second in the last window and since; None before two steps are done"""
        self._before = 0.0, 0
        """Seconds and steps of the last window"""

    def start(self, step: int) -> None:
        """Starts the clock when `step` is done. That step compiled, so it doesn't count."""
        self._start = self._now = time.perf_counter()
        self._first = self._last = step

    def done(self, step: int) -> None:
        """Records that `step` is done."""
        if self._start is None:
            return
        self._now, self._last = time.perf_counter(), step
        seconds, steps = self._before
        if step > self._first:
            self.rate = (steps + step - self._first) / (seconds + self._now - self._start)

    def window(self) -> dict[str, float]:
        """Ends a window at the last step that is done. Returns its tokens_per_second and mfu, or {} if it has no
        step."""
        if self._start is None or self._last == self._first:
            return {}
        seconds, steps = self._now - self._start, self._last - self._first
        self._seconds, self._steps = self._seconds + seconds, self._steps + steps
        self._start, self._first, self._before = self._now, self._last, (seconds, steps)
        rate = steps / seconds
        # The peak can't be below the mean speed. A single window doesn't prove that: the host's delays may distort it.
        self.peak = max(self.peak, self._steps / self._seconds * self._flops)
        return {"tokens_per_second": rate * self._tokens, "mfu": self._mfu(rate)}

    def pause(self, seconds: float) -> None:
        """Excludes the time that something else took since the last step was done."""
        if self._start is not None:
            self._start, self._now = self._start + seconds, self._now + seconds

    def measure_again(self) -> None:
        """Measures the peak of CPUs again; call it in a pause. It was too low if other processes used the CPUs. That of
        an accelerator isn't measured again, because no others use it and its memory is full."""
        now = time.perf_counter()
        if self.source == "measured" and jax.default_backend() == "cpu" and now - self._measured > REMEASURE_SECONDS:
            self.peak = max(self.peak, measure_gemm(self._dtype))
            self._measured = time.perf_counter()

    @property
    def mean(self) -> tuple[float, float]:
        """Tokens per second and MFU over all windows; 0 if no step was measured."""
        rate = self._steps / self._seconds if self._seconds else 0.0
        return rate * self._tokens, self._mfu(rate)

    def _mfu(self, rate: float) -> float:
        return min(1.0, rate * self._flops / self.peak)

    def __str__(self) -> str:
        if self.rate is None:
            return "measuring speed"
        return f"{self.rate * self._tokens:,.0f} tok/s | MFU {self._mfu(self.rate):.1%}"

    def left(self, steps: int) -> str:
        """How long `steps` more will take, as text."""
        return "" if self.rate is None else f" | ETA {steps / self.rate:.0f} s"


def step_flops(config: ModelConfig, batch: int, seq: int) -> int:
    """FLOPs of a training step. With adapters only their parameters have gradients, so each of the other matrices is
    multiplied by twice, not three times."""
    if not config.lora.rank:
        return config.train_flops(batch, seq)
    tokens, attended = batch * seq, batch * seq * (seq + 1) // 2
    plain = dataclasses.replace(config, lora=LoraConfig())
    matrices = plain.forward_flops(tokens, 0)
    attention = plain.forward_flops(tokens, attended) - matrices
    adapters = sum(spec.size for spec in parameter_specs(config).values() if spec.role is Role.ADAPTER)
    return 2 * matrices + 3 * attention + 6 * adapters * tokens
