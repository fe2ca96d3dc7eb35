"""`isthmus bench features`: what guesses, the prefix cache, prompts beside streams, options and forms of text do to the
speed of one engine, each beside the same work without it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from isthmus.benchmarks.case import Bench, Qualities, Tick, progress_bar
from isthmus.benchmarks.figures import PAIRED, median, number, paragraphs, table
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.record import Record
from isthmus.errors import ConfigError
from isthmus.llm import LLM
from isthmus.model.device.hardware import default_dtype
from isthmus.model.parameter import Dtype
from isthmus.serve.engine.config import EngineConfig

SHARED = 0.9
"""Share of a prompt that all prompts have in common, where the prefix cache is measured"""
STORY = "Once upon a time, in a land far away, there lived a"
FORM = "([a-z]+ )+"
"""A regular expression that never ends, so that every step has masks"""
OPTIONS: dict[str, Any] = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1,
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "logprobs": 5,
}  # fmt: skip
"""All filters, penalties and log-probabilities at once"""


@dataclass(frozen=True)
class FeaturesBench(Bench):
    """Measures what the engine's features do to its speed, on a model that writes text."""

    model: Path | None = None
    """A model folder or a GGUF file; random weights write no text that repeats"""
    dtype: Dtype | None = None
    """What the network computes in; by default bfloat16 except on CPU"""
    quantize: Literal["none", "int8", "int6", "int5", "int4"] = "none"
    """Integers to make of the weights while loading, as `isthmus serve` makes them"""
    streams: int = 32
    """Sequences at once, where options and forms are measured"""
    tokens: int = 192
    """Tokens that a request draws"""
    prompt: int = 7000
    """Tokens of the prompt that comes beside streams, and of all prompts of the prefix cache together"""
    beside: int = 8
    """Streams that run when it comes"""
    repeats: int = 5
    """How often each is measured, in turns with the same work without it"""

    def validate(self) -> None:
        if self.model is None:
            raise ConfigError("model: name a folder or a GGUF file; random weights write no text that repeats")
        self.check_least(streams=1, tokens=16, prompt=64, beside=1, repeats=1)


class _Engines:
    """Two engines of one model, with and without guesses, and the work that is measured on them."""

    def __init__(self, config: FeaturesBench) -> None:
        assert config.model is not None
        rows = max(config.streams, config.beside + 1)
        self.config = config
        self.plain, self.guessing = (
            LLM(
                config.model,
                dtype=config.dtype or default_dtype(),
                quantize=config.quantize,
                engine=EngineConfig(max_sequences=rows, draft_rows=draft_rows, pages=self._pages(rows)),
                progress=False,
            )
            for draft_rows in (0, 8)
        )
        vocab = self.plain._preparation.tokenizer.vocab_size
        self._random = np.random.default_rng(0)
        self._ids: Callable[[int], list[int]] = lambda count: self._random.integers(0, vocab, count).tolist()

    def _pages(self, rows: int) -> int:
        longest = max(2 * self.config.prompt, 2048) + rows * (2 * self.config.tokens + 256)
        return 1 + longest // EngineConfig().page_size + rows

    def close(self) -> None:
        self.plain.close()
        self.guessing.close()

    def guesses(self, *, repeats: bool) -> tuple[float, float]:
        """Tokens per second of one sequence without and with guesses. repeats: whether it repeats its own prompt."""
        source = Path(__file__).read_text()[:2000]
        prompt = f"A file:\n\n{source}\n\nThe same file, unchanged:\n\n{source[:200]}" if repeats else STORY
        temperature = 0.0 if repeats else 1.0
        return self._rate(self.plain, prompt, temperature), self._rate(self.guessing, prompt, temperature)

    def _rate(self, llm: LLM, prompt: str, temperature: float) -> float:
        """Tokens per second after the first."""
        options: dict[str, Any] = {"temperature": temperature, "seed": 1, "ignore_eos": True}
        answer = llm.generate(prompt, max_tokens=self.config.tokens, **options)
        return (answer.completion_tokens - 1) / (answer.total_seconds - answer.time_to_first_token)

    def prefix_cache(self) -> tuple[float, float]:
        """Prompt tokens per second without and with the prefix cache, of prompts that mostly begin alike."""
        size = max(32, self.config.prompt // 16)
        shared = self._ids(int(SHARED * size))
        prompts = [shared + self._ids(size - len(shared)) for _ in range(16)]
        seconds = []
        for cache in ("off", "on"):
            start = time.perf_counter()
            self.plain.generate(prompts, max_tokens=1, ignore_eos=True, cache=cache, progress=False)
            seconds.append(time.perf_counter() - start)
        return 16 * size / seconds[0], 16 * size / seconds[1]

    def together(self, **options: Any) -> float:
        """Tokens per second of `streams` sequences, the time of their prompts included."""
        prompts = [self._ids(32) for _ in range(self.config.streams)]
        start = time.perf_counter()
        answers = self.plain.generate(
            prompts, max_tokens=self.config.tokens, seed=1, progress=False, cache="off", **options
        )
        return sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - start)

    def beside(self) -> dict[str, Any]:
        """A long prompt alone, and beside streams: the times between their tokens before and during it, and until its
        first token, in seconds."""
        prompt, llm = self._ids(self.config.prompt), self.plain
        alone = llm.generate(prompt, max_tokens=1, cache="off", ignore_eos=True).time_to_first_token
        times: list[list[float]] = [[] for _ in range(self.config.beside)]
        done = threading.Event()

        def follow(seen: list[float]) -> None:
            options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "cache": "off"}
            for _ in llm.stream(self._ids(32), max_tokens=10 * self.config.tokens, **options):
                seen.append(time.perf_counter())
                if done.is_set():
                    return

        with ThreadPoolExecutor(self.config.beside) as pool:
            for seen in times:
                pool.submit(follow, seen)
            while min(map(len, times)) < self.config.tokens // 2:
                time.sleep(0.01)
            start = time.perf_counter()
            first = llm.generate(prompt, max_tokens=1, cache="off", ignore_eos=True).time_to_first_token
            end = time.perf_counter()
            done.set()
        return {
            "alone": alone,
            "first": first,
            "gaps_before": _gaps(times, 0.0, start),
            "gaps_during": _gaps(times, start, end),
        }


def _gaps(times: Sequence[Sequence[float]], start: float, end: float) -> list[float]:
    return [gap for seen in times for gap in np.diff([at for at in seen if start <= at <= end]).tolist()]


RATIOS = {
    "guesses, text that repeats": "tok/s of one sequence",
    "guesses, text that doesn't": "tok/s of one sequence",
    "prefix cache, 90% shared": "prompt tok/s",
    "all filters, penalties and log-probabilities": "tok/s of all streams",
    "a form of text": "tok/s of all streams",
}
"""What is compared with the same work without it, and in which unit"""


def run(config: FeaturesBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError for a model that can't be read."""
    assert config.model is not None
    engines = _Engines(config)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in RATIOS}
    beside = []
    try:
        with progress_bar(console, "features", config.repeats * (len(RATIOS) + 1)) as tick:
            for _ in range(config.repeats):
                _one_turn(engines, pairs, tick)
                beside.append(engines.beside())
                tick()
    finally:
        engines.close()
    figures = {
        "ratios": [
            {
                "name": name,
                "unit": RATIOS[name],
                "without": median([one for one, _ in found]),
                "with": median([other for _, other in found]),
                "ratio": median([other / one for one, other in found]),
            }
            for name, found in pairs.items()
        ],
        "beside": _summary(beside),
        "weights": config.quantize if config.quantize != "none" else config.dtype or default_dtype(),
    }
    subject = f"{config.model.resolve().stem}-{figures['weights']}"
    return Record("features", subject, describe(), dataclasses.asdict(config), figures)


def _one_turn(engines: _Engines, pairs: dict[str, list[tuple[float, float]]], tick: Tick) -> None:
    def options() -> tuple[float, float]:
        return engines.together(temperature=0.0, ignore_eos=True), engines.together(ignore_eos=True, **OPTIONS)

    def forms() -> tuple[float, float]:
        return engines.together(temperature=0.7, ignore_eos=True), engines.together(temperature=0.7, regex=FORM)

    measures: list[Callable[[], tuple[float, float]]] = [
        lambda: engines.guesses(repeats=True),
        lambda: engines.guesses(repeats=False),
        engines.prefix_cache,
        options,
        forms,
    ]
    for name, measure in zip(RATIOS, measures, strict=True):
        pairs[name].append(measure())
        tick()


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        "gap_alone": median([median(run["gaps_before"]) for run in runs]),
        "gap_median": median([median(run["gaps_during"]) for run in runs]),
        "gap_p99": median([float(np.quantile(run["gaps_during"], 0.99)) for run in runs]),
        "first_alone": median([run["alone"] for run in runs]),
        "first": median([run["first"] for run in runs]),
    }


def show(record: Record, _: Qualities) -> str:
    figures, beside = record.figures, record.figures["beside"]
    config = record.config
    rows = [
        [row["name"], row["unit"], number(row["without"]), number(row["with"]), f"{row['ratio']:.2f}x"]
        for row in figures["ratios"]
    ]
    gap, p99, alone = (1e3 * beside[name] for name in ("gap_median", "gap_p99", "gap_alone"))
    text = (
        f"{record.subject}; {config['streams']} streams, {config['tokens']} tokens each. "
        f"A prompt of {config['prompt']:,} tokens beside {config['beside']} streams: their median gap is {gap:.0f} ms "
        f"and p99 {p99:.0f} ms, of {alone:.1f} ms alone; its first token comes after {beside['first']:.1f} s, "
        f"{beside['first'] / beside['first_alone']:.2f}x of alone. {PAIRED}"
    )
    return paragraphs(text, table(("", "unit", "without", "with", "ratio"), rows))
