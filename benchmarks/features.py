"""`isthmus bench features`: what guesses, the prefix cache, scores, prompts beside streams, options, forms of text and
adapters do to the speed of one engine, each beside the same work without it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from isthmus.benchmarks import adapter_rates
from isthmus.benchmarks.case import Bench, Qualities, Tick, progress_bar
from isthmus.benchmarks.figures import PAIRED, median, number, paragraphs, table
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.record import Record
from isthmus.errors import ConfigError
from isthmus.llm import LLM
from isthmus.model.device.hardware import default_dtype
from isthmus.model.parameter import Dtype
from isthmus.model.process.cleaning import temporary_folder
from isthmus.serve.engine.config import EngineConfig

SHARED = 0.9
"""Share of a prompt that all prompts have in common, where the prefix cache is measured"""
STORY = "Once upon a time, in a land far away, there lived a"
FORMAL = {
    "type": "object",
    "properties": {
        name: {"type": "boolean"} for name in ("is_available_now", "requires_confirmation", "was_found_in_the_index")
    },
    "required": ["is_available_now", "requires_confirmation", "was_found_in_the_index"],
    "additionalProperties": False,
}
"""A schema that leaves little choice: three words of a text that is mostly names"""
FORM = "([a-z]+ )+"
"""A regular expression that never ends, so that every step has masks"""
ONE: dict[str, Any] = {"temperature": 1.0, "seed": 1}
"""How the text of one sequence is drawn: with a seed, so that it is the same again"""
SEQUENCES = (1, 8, 32)
"""How many at once, where bits that don't depend on the batch are measured"""
OPTIONS: dict[str, Any] = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1,
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "logprobs": 5,
}  # fmt: skip
"""All filters, penalties and log-probabilities at once"""


@dataclass(frozen=True)
class FeaturesBench(Bench):
    """Measures what the engine's features do to its speed, on a model that writes text.

    Guesses (of text that repeats, that its caller foretells, that a schema forces, that was answered before), several
    steps a launch, the prefix cache, scores, a long prompt beside streams, sampling options, forms, adapters, and bits
    that don't depend on the batch, each in turns with the same work without it. It takes minutes; --repeats 1
    --tokens 64 gives a first impression.

    example: isthmus bench features --model models/some-instruct --dtype bfloat16
    """

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
    """Engines of one model, without guesses, with them, with launches of single steps, and with XLA's own products; and
    the work that is measured on them."""

    def __init__(self, config: FeaturesBench) -> None:
        assert config.model is not None
        rows = max(config.streams, config.beside + 1, *SEQUENCES)
        self.config = config
        self.plain, self.guessing, self.single, self.free = (
            LLM(
                config.model,
                dtype=config.dtype or default_dtype(),
                quantize=config.quantize,
                engine=EngineConfig(
                    max_sequences=rows, pages=self._pages(rows), draft_rows=draft_rows, steps_per_launch=steps
                ),
                kernels=kernels,
                progress=False,
            )
            for draft_rows, steps, kernels in (
                (0, 8, "auto"),
                (8, 8, "auto"),
                (0, 1, "auto"),
                (0, 8, "auto,linear=reference"),
            )
        )
        vocab = self.plain._preparation.tokenizer.vocab_size
        self._salt = 0
        self._random = np.random.default_rng(0)
        self._ids: Callable[[int], list[int]] = lambda count: self._random.integers(0, vocab, count).tolist()

    def _pages(self, rows: int) -> int:
        longest = max(2 * self.config.prompt, 2048) + rows * (2 * self.config.tokens + 256)
        return 1 + longest // EngineConfig().page_size + rows

    def close(self) -> None:
        for engine in (self.plain, self.guessing, self.single, self.free):
            engine.close()

    def guesses(self, *, repeats: bool) -> tuple[float, float]:
        """Tokens per second of one sequence without and with guesses. repeats: whether it repeats its own prompt."""
        source = Path(__file__).read_text()[:2000]
        prompt = f"A file:\n\n{source}\n\nThe same file, unchanged:\n\n{source[:200]}" if repeats else STORY
        options: dict[str, Any] = {"temperature": 0.0 if repeats else 1.0, "ignore_eos": True}
        return self._rate(self.plain, prompt, **options), self._rate(self.guessing, prompt, **options)

    def launches(self) -> tuple[float, float]:
        """The same with launches of single steps and of several."""
        return self._rate(self.single, STORY, ignore_eos=True), self._rate(self.plain, STORY, ignore_eos=True)

    def forced(self) -> tuple[float, float]:
        """The same of a text whose form mostly leaves one way."""
        return self._rate(self.plain, STORY, schema=FORMAL), self._rate(self.guessing, STORY, schema=FORMAL)

    def predicted(self) -> tuple[float, float]:
        """The same of a text that its caller has foretold."""
        text = self.plain.generate(STORY, max_tokens=self.config.tokens, **ONE, cache="off").text
        options: dict[str, Any] = {"ignore_eos": True, "predicted_text": text}
        return self._rate(self.plain, STORY, **options), self._rate(self.guessing, STORY, **options)

    def repeated(self) -> tuple[float, float]:
        """The same of an answer that its caller has had before."""
        self._salt += 1
        options: dict[str, Any] = {"ignore_eos": True, "cache": "on", "cache_salt": str(self._salt)}
        self._rate(self.guessing, STORY, **options)
        return self._rate(self.plain, STORY, **options), self._rate(self.guessing, STORY, **options)

    def _rate(self, llm: LLM, prompt: str, **options: Any) -> float:
        """Tokens per second after the first."""
        answer = llm.generate(prompt, max_tokens=self.config.tokens, **{**ONE, "cache": "off", **options})
        return (answer.completion_tokens - 1) / (answer.total_seconds - answer.time_to_first_token)

    def scores(self, *, given: bool) -> tuple[float, float]:
        """Prompt tokens per second of a prompt that is only computed, and of one whose tokens are scored. given: by
        Score, as a continuation; else by a prompt's log-probabilities."""
        prompt = self._ids(max(64, self.config.prompt // 16))
        start = time.perf_counter()
        self.plain.generate(prompt, max_tokens=1, ignore_eos=True, cache="off")
        middle = time.perf_counter()
        if given:
            self.plain.score(prompt[:1], prompt[1:], cache="off")
        else:
            self.plain.generate(prompt, max_tokens=1, ignore_eos=True, cache="off", prompt_logprobs=0)
        end = time.perf_counter()
        return len(prompt) / (middle - start), len(prompt) / (end - middle)

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

    def same_bits(self, sequences: int) -> tuple[float, float]:
        """Tokens per second of so many sequences with XLA's products, which choose the order of a sum by the batch, and
        with kernels whose order is fixed."""
        prompts = [self._ids(32) for _ in range(sequences)]
        options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        return self.together(self.free, prompts, **options), self.together(self.plain, prompts, **options)

    def together(self, llm: LLM | None = None, prompts: list[list[int]] | None = None, **options: Any) -> float:
        """Tokens per second of `streams` sequences, or of `prompts`, the time of the prompts included."""
        prompts = prompts or [self._ids(32) for _ in range(self.config.streams)]
        start = time.perf_counter()
        answers = (llm or self.plain).generate(
            prompts, max_tokens=self.config.tokens, seed=1, progress=False, cache="off", **options
        )
        return sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - start)

    def masks(self) -> float:
        """The share of a step's time in which the host makes masks for `streams` sequences with a form; the device
        computes meanwhile."""
        engine = self.plain._engine
        before = engine.times.masks
        start = time.perf_counter()
        self.together(temperature=0.7, regex=FORM)
        return (engine.times.masks - before) / (time.perf_counter() - start)

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
    "guesses, a form that leaves one way": "tok/s of one sequence",
    "guesses, predicted text": "tok/s of one sequence",
    "guesses, an answer again": "tok/s of one sequence",
    "several steps a launch": "tok/s of one sequence",
    "prefix cache, 90% shared": "prompt tok/s",
    "Score, beside a plain prompt": "prompt tok/s",
    "a prompt's log-probabilities": "prompt tok/s",
    "all filters, penalties and log-probabilities": "tok/s of all streams",
    "a form of text": "tok/s of all streams",
    **{f"the same bits in any batch, {count}": "tok/s of all streams" for count in SEQUENCES},
}
"""What is compared with the same work without it, and in which unit"""


def run(config: FeaturesBench, console: Console) -> Record:
    """Measures and returns the record. Raises ConfigError for a model that can't be read."""
    assert config.model is not None
    engines = _Engines(config)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in RATIOS}
    beside, masks = [], []
    try:
        with progress_bar(console, "features", config.repeats * (len(RATIOS) + 2)) as tick:
            for _ in range(config.repeats):
                _one_turn(engines, pairs, tick)
                masks.append(engines.masks())
                tick()
                beside.append(engines.beside())
                tick()
    finally:
        engines.close()
    adapters = _adapters(config, console)
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
        "masks": median(masks),
        "adapters": adapters,
        "weights": config.quantize if config.quantize != "none" else config.dtype or default_dtype(),
    }
    subject = f"{config.model.resolve().stem}-{figures['weights']}"
    return Record("features", subject, describe(), dataclasses.asdict(config), figures)


def _adapters(config: FeaturesBench, console: Console) -> dict[str, Any]:
    assert config.model is not None
    with temporary_folder("isthmus-bench-") as folder:
        timed = adapter_rates.AdapterRates(config.model, folder, config.dtype, config.quantize, config.tokens)
        runs = []
        try:
            with progress_bar(console, "adapters", config.repeats) as tick:
                for _ in range(config.repeats):
                    runs.append(timed.rates())
                    tick()
            return adapter_rates.summary(runs, timed.limits())
        finally:
            timed.close()


def _one_turn(engines: _Engines, pairs: dict[str, list[tuple[float, float]]], tick: Tick) -> None:
    def options() -> tuple[float, float]:
        return engines.together(temperature=0.0, ignore_eos=True), engines.together(ignore_eos=True, **OPTIONS)

    def forms() -> tuple[float, float]:
        return engines.together(temperature=0.7, ignore_eos=True), engines.together(temperature=0.7, regex=FORM)

    measures: list[Callable[[], tuple[float, float]]] = [
        lambda: engines.guesses(repeats=True),
        lambda: engines.guesses(repeats=False),
        engines.forced,
        engines.predicted,
        engines.repeated,
        engines.launches,
        engines.prefix_cache,
        lambda: engines.scores(given=True),
        lambda: engines.scores(given=False),
        options,
        forms,
        *(partial(engines.same_bits, count) for count in SEQUENCES),
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
        f"{beside['first'] / beside['first_alone']:.2f}x of alone. "
        "The same bits in any batch are beside XLA's own products, whose bits depend on the batch. "
        + (f"Masks for a form take {figures['masks']:.1%} of a step on the host. " if "masks" in figures else "")
        + PAIRED
    )
    parts = [text, table(("", "unit", "without", "with", "ratio"), rows)]
    parts += [adapter_rates.show(figures["adapters"])] if "adapters" in figures else []
    return paragraphs(*parts)
