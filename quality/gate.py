"""The quality gate of `isthmus convert --quantize`: compares what was written with the original, and may refuse it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.console import Console

from isthmus.model.device.memory import release_heap
from isthmus.model.execution import DEFAULT_EXECUTION
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.process.progress import Stages
from isthmus.model.weights.folder import ModelFolder
from isthmus.quality import compare as quality
from isthmus.quality.compare import KeptPredictions, bounds, cost, described, passes, undecided
from isthmus.quality.costs import MeasuredCost
from isthmus.quality.divergence import Quality
from isthmus.quality.suggest import coarsest, rules_of, suggestion
from isthmus.quality.texts import TextConfig
from isthmus.serve.engine.build import open_model

Write = Callable[[Sequence[str], Path], None]
"""Writes the original, with integers by these rules, into an existing folder"""


class QualityError(RuntimeError):
    """A quantized model is too far from the original."""


@dataclass(frozen=True)
class GateConfig(TextConfig):
    serve_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which a quantized model is compared, as for `isthmus serve --dtype`; the original runs in float32"""
    cache_dtype: Literal["model", "float32", "bfloat16", "int8"] = "model"
    """Dtype of keys and values when a quantized model is compared, as for `isthmus serve --engine.cache-dtype`; the
    original's are float32"""
    suggest: bool = True
    """If a quantized model is refused, try others until one is accepted; each takes as long again"""
    force: bool = False
    """Write a quantized model however far it is from the original"""


@dataclass(frozen=True)
class QualityGate:
    """Writes a quantized model, compares it with the original, and refuses it if it is too far from that."""

    config: GateConfig
    original: ModelFolder
    windows: np.ndarray
    """int32[windows, size]: the text on which models are compared"""
    kept: KeptPredictions
    """The original's predictions for the windows"""
    folder: Path
    """Where the model is written"""
    shown: Stages
    console: Console

    def write(self, quantize: str, write: Write) -> None:
        """Writes the model, quantized by a scheme or rules, into the folder, with quality.json. Raises QualityError
        when its mean figures are outside of the bounds and it is not forced."""
        rules = rules_of(quantize)
        bits = coarsest(self.original.config, rules)
        found = self._measure(rules, self.folder, write)
        self._say(quantize, found)
        if undecided(found, bits):
            doubt = f"{quantize}: its interval reaches over the bounds, {bounds(bits)}; more --windows narrow it"
            self.console.print(doubt, style="yellow", markup=False)
        if not passes(found, bits) and not self.config.force:
            instead = self._instead(rules, write)
            raise QualityError(
                f"{quantize} moves this model too far: {described(found)}; the bounds are {bounds(bits)}; {instead}"
            )
        self._cost(quantize, found).save(self.folder)

    def _measure(self, rules: Sequence[str], folder: Path, write: Write, most: int | None = None) -> Quality:
        write(rules, folder)
        release_heap()
        windows = self.windows[:most]
        comparing = self.shown.begin("comparing with the original", len(windows), "windows")
        served = open_model(folder, self.config.serve_dtype)
        return quality.compare(self.kept, served, self.config.cache_dtype, windows, comparing.advance)

    def _instead(self, refused: Sequence[str], write: Write) -> str:
        """The advice that a refusal gives: rules that would pass, if they are looked for and found, and --force."""
        force = "--force writes it all the same"
        if not self.config.suggest:
            return force

        def measure(rules: Sequence[str], most: int | None) -> Quality:
            with temporary_folder("attempt-", self.folder) as folder:
                return self._measure(rules, folder, write, most)

        found = suggestion(self.original.config, refused, measure, self._say)
        if found is None:
            return f"nothing else that was tried would pass, {force}"
        name, its = found
        return f"--quantize '{name}' would pass: {described(its)}; {force}"

    def _say(self, quantize: str, found: Quality) -> None:
        self.console.print(f"{quantize}: {described(found)}", highlight=False, markup=False)

    def _cost(self, quantize: str, found: Quality) -> MeasuredCost:
        config = self.config
        dtype = open_model(self.folder, config.serve_dtype).execution.dtype
        return MeasuredCost(
            **vars(cost(found, dtype, dtype if config.cache_dtype == "model" else config.cache_dtype)),
            quantize=quantize,
            source=", ".join(config.text) or "Python's documentation",
            perplexity=found.perplexity,
            original_perplexity=found.base_perplexity,
            windows=found.windows,
            platform=jax.default_backend(),
            date=datetime.date.today().isoformat(),
        )


@contextlib.contextmanager
def opened(
    config: GateConfig, original: ModelFolder, windows: np.ndarray, folder: Path, shown: Stages, console: Console
) -> Iterator[QualityGate]:
    """Yields the gate for `folder`, after the original has predicted int32[windows, size]. original: unstacked, and
    without adapters of its own. Raises ConfigError when the folder's disk has no room for the predictions."""
    predicting = shown.begin("predicting with the original", len(windows), "windows")
    with quality.original_kept(
        dataclasses.replace(original, execution=DEFAULT_EXECUTION), windows, folder, predicting.advance
    ) as kept:
        release_heap()
        yield QualityGate(config, original, windows, kept, folder, shown, console)
