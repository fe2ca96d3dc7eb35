"""What a run says of its speed: never nothing, never more than the machine can."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.commands.train import main, parse
from isthmus.model.config import PRESETS
from isthmus.train import optimizer, speed
from isthmus.train.config import OptimizerConfig, TrainConfig
from isthmus.train.optimizer import LearningRates, build_schedule, first_difference
from isthmus.train.speed import Speed

TOKENS, FLOPS = 100, 1000


class Clock:
    """Time as a test makes it pass."""

    def __init__(self) -> None:
        self.now = 50.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed, "time", made)
    monkeypatch.setattr(speed, "peak_flops", lambda dtype, devices: (1e4, "measured"))
    return made


def test_speed_leaves_out_the_first_step_and_the_pauses(clock: Clock) -> None:
    """Compilation, evaluation and saving aren't the speed of training."""
    meter = Speed(TOKENS, FLOPS, "float32", 1)
    assert str(meter) == "measuring speed" and meter.left(7) == "" and meter.window() == {}
    clock.now += 100  # the first step compiles
    meter.done(1)
    meter.start(1)
    assert meter.rate is None and meter.mean == (0, 0)
    for step in 2, 3, 4:
        clock.now += 0.5
        meter.done(step)
        assert meter.rate == 2 and str(meter) == "200 tok/s | MFU 20.0%" and meter.left(7) == " | ETA 4 s"
    assert meter.window() == {"tokens_per_second": 200, "mfu": 0.2}
    clock.now += 30
    meter.pause(30)
    shown = []
    for step in 5, 6:
        clock.now += 0.25
        meter.done(step)
        shown.append(str(meter))
    assert shown == ["229 tok/s | MFU 22.9%", "250 tok/s | MFU 25.0%"], "each step tells, not each window"
    assert meter.window() == {"tokens_per_second": 400, "mfu": 0.4}
    assert meter.mean == (pytest.approx(250), pytest.approx(0.25))


@given(st.lists(st.floats(1e-4, 10), min_size=2, max_size=20))
def test_no_share_is_above_the_whole(seconds: list[float]) -> None:
    """MFU was 132% where the peak was measured while other programs ran."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(speed, "time", clock)
        patch.setattr(speed, "peak_flops", lambda dtype, devices: (1e-3, "measured"))
        meter = Speed(TOKENS, FLOPS, "float32", 1)
        meter.start(0)
        for step, passed in enumerate(seconds, 1):
            clock.now += passed
            meter.done(step)
            assert float(re.findall(r"MFU ([\d.]+)%", str(meter))[0]) <= 100
            if step % 3 == 0:
                assert 0 < meter.window()["mfu"] <= 1
        meter.window()
        assert 0 < meter.mean[1] <= 1


def test_a_peak_of_a_busy_machine_is_measured_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the best of several, and not at every pause."""
    peaks = iter([3e4, 2e4, 5e4])
    monkeypatch.setattr(speed, "measure_gemm", lambda dtype: next(peaks))
    meter, seen = Speed(TOKENS, FLOPS, "float32", 1), []
    for _ in range(6):
        clock.now += 31
        meter.measure_again()
        seen.append(meter.peak)
    assert seen == [1e4, 3e4, 3e4, 3e4, 3e4, 5e4]


def test_a_first_try_says_its_speed_and_what_it_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest preset, few steps, no other setting: it was refused, and then it said 0 tok/s, ETA nan, MFU 132%."""
    monkeypatch.setattr(speed, "peak_flops", lambda dtype, devices: (1e3, "measured"))
    (tmp_path / "book.txt").write_text("".join(f"sentence {i}. " for i in range(3000)))
    out = tmp_path / "out"
    assert main([str(tmp_path / "book.txt"), "--preset", "nano", "--steps", "5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert not re.search(r"\bnan\b|\b0 tok/s|\binf\b", said)
    assert all(float(share) <= 100 for share in re.findall(r"MFU ([\d.]+)%", said)) and "MFU" in said
    assert "step 1/5 | loss" in said and "measuring speed" in said and "ETA" in said
    assert "optimizer.warmup_steps=100 leaves nothing of steps=5: 0 instead" in said
    assert json.loads((out / "train.json").read_text())["optimizer"]["warmup_steps"] == 0
    assert "data: 1 file read\n" in said
    assert re.search(r"held out: the end of 1, 1 kB \(2\.\d%\)", said)


def test_names_that_the_terminal_has_no_letters_for_are_spelt_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container without a locale, or through a pipe in Latin-1."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert main([str(tmp_path / "größer [bold].txt"), "--out", str(tmp_path / "out")]) == 2
    stdout.flush()
    assert b"gr\\xf6\\xdfer [bold].txt does not exist" in stdout.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_works_with_its_defaults(name: str) -> None:
    """nano's context is shorter than the default sequence."""
    config = parse(["text.txt", "--preset", name])
    config.validate()
    assert config.text.seq == min(TrainConfig().text.seq, PRESETS[name].context_length)


def test_help_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    """By their sizes, which are what one chooses by."""
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name, size in ("nano", "1.3M"), ("125m", "109.5M"), ("8b", "8,030.3M"):
        assert re.search(rf"^ +{name} +{re.escape(size)} ", said, re.MULTILINE)
    assert all(re.search(rf"^ +{name} ", said, re.MULTILINE) for name in PRESETS)


# learning rates

SCHEDULES = [
    OptimizerConfig(schedule="cosine", warmup_steps=7),
    OptimizerConfig(schedule="cosine", warmup_steps=0, final_lr=0.0),
    OptimizerConfig(schedule="wsd", warmup_steps=7),
    OptimizerConfig(schedule="wsd", warmup_steps=0, decay_fraction=1.0),
    OptimizerConfig(schedule="wsd", warmup_steps=100, decay_fraction=0.01),
]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: f"{config.schedule}-{config.warmup_steps}")
@pytest.mark.parametrize("steps", [1, 50, 5000])
def test_learning_rates_on_the_host_are_the_optimizers(config: OptimizerConfig, steps: int) -> None:
    """What metrics.jsonl says must be what was used; read by blocks, of which the second is no copy of the first."""
    host, device = LearningRates(config, steps), build_schedule(config, steps)
    compiled = jax.jit(device)
    near = {*range(min(steps, 60)), 4094, 4095, 4096, 4097, steps - 1}
    for step in [*sorted(step for step in near if step < steps), 0]:
        count = jnp.int32(step)  # as the optimizer counts
        for want in device(count), compiled(count):
            assert host(step) == pytest.approx(float(want), rel=1e-7, abs=1e-6 * config.lr), step


def test_reading_a_learning_rate_asks_the_device_once_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking it at each step waits for all that was launched before."""
    asked: list[int] = []

    def counted(config: OptimizerConfig, steps: int) -> object:
        inner = build_schedule(config, steps)
        return lambda step: (asked.append(np.size(step)), inner(step))[1]

    monkeypatch.setattr(optimizer, "build_schedule", counted)
    rates = LearningRates(SCHEDULES[2], 10_000)
    for step in range(10_000):
        rates(step)
    assert asked == [LearningRates.BLOCK] * 3


@given(
    st.sampled_from(["cosine", "wsd"]), st.integers(0, 30), st.floats(0.01, 1),
    st.integers(1, 90), st.integers(1, 90), st.integers(0, 90),
)  # fmt: skip
def test_the_first_difference_is_found(
    schedule: str, warmup: int, decay: float, before: int, after: int, done: int
) -> None:
    """A step too many, and a lengthened run is another one; a step too few, and it is refused for nothing."""
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup, decay_fraction=decay)  # type: ignore[arg-type]
    old, new = build_schedule(config, before), build_schedule(config, after)
    rates = [np.array([f(jnp.int32(step)) for step in range(done)], np.float32) for f in (old, new)]
    differ = np.flatnonzero(rates[0] != rates[1]).tolist()
    assert first_difference(config, before, after, done) == (differ[0] if differ else None)


@pytest.mark.parametrize(("warmup", "steps", "want"), [(100, 100, 10), (100, 101, 100), (100, 5, 0), (0, 1, 0)])
def test_a_warmup_that_would_take_all_steps_is_a_tenth(warmup: int, steps: int, want: int) -> None:
    config = OptimizerConfig(warmup_steps=warmup)
    assert config.fitted(steps) == dataclasses.replace(config, warmup_steps=want)
