"""What LoRA adapters cost a step: no adapter, one for all rows, and eight different ones, beside what the hardware must
do for them at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from isthmus.benchmarks.figures import median, number, paragraphs, table
from isthmus.llm import LLM
from isthmus.model.config import LoraConfig
from isthmus.model.device.hardware import default_dtype
from isthmus.model.parameter import Dtype, Role
from isthmus.model.transformer import parameter_specs
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.huggingface.adapters import save_adapter
from isthmus.serve.engine.config import EngineConfig

ADAPTERS = 8
RANK = 16
ROWS = (1, 8, 32)
KINDS = {"none": 0, "one": 1, "eight": ADAPTERS}
"""How many adapters the rows of a step have"""
_PROMPT = 8

Rates = dict[int, dict[str, float]]
"""Tokens per second by rows and kind"""


def write_adapters(model: Path, folder: Path, count: int = ADAPTERS, rank: int = RANK) -> dict[str, Path]:
    """Writes adapters of random numbers for a model's attention and MLP into `folder`. Returns their folders by
    name."""
    base = open_folder(model)
    config = dataclasses.replace(base.config, lora=LoraConfig(rank))
    made = {}
    for index in range(count):
        random = np.random.default_rng(index)
        factors = {
            path: random.normal(0, 0.01, spec.shape).astype(np.float32)
            for path, spec in parameter_specs(config).items()
            if spec.role is Role.ADAPTER
        }
        made[f"adapter{index}"] = folder / f"adapter{index}"
        save_adapter(made[f"adapter{index}"], base, config, factors)  # type: ignore[arg-type]
    return made


class AdapterRates:
    """An engine with adapters, whose steps are timed with and without them."""

    def __init__(self, model: Path, folder: Path, dtype: Dtype | None, quantize: Any, tokens: int) -> None:
        """folder: an empty one for the adapters. tokens: how many each row draws."""
        self._tokens, self._adapters = tokens, write_adapters(model, folder)
        longest = _PROMPT + tokens
        size = EngineConfig.page_size
        self.llm = LLM(
            model,
            dtype=dtype or default_dtype(),
            quantize=quantize,
            adapters=self._adapters,
            engine=EngineConfig(
                max_sequences=max(ROWS),
                draft_rows=0,
                context_length=longest,
                pages=1 + (max(ROWS) + 1) * -(-longest // size),
            ),
            progress=False,
        )

    def close(self) -> None:
        self.llm.close()

    def rates(self) -> Rates:
        """Measures once. One row has at most one adapter, so its "eight" is left out."""
        return {
            rows: {kind: self._rate(rows, count) for kind, count in KINDS.items() if count <= max(1, rows)}
            for rows in ROWS
        }

    def _rate(self, rows: int, count: int) -> float:
        """Tokens per second of `rows` sequences after their first tokens, of `count` adapters in equal shares."""
        names = list(self._adapters)[:count] or [""]
        share = rows // len(names)
        options: dict[str, Any] = {"max_tokens": self._tokens, "temperature": 0.0, "ignore_eos": True, "cache": "off"}

        def ask(name: str) -> Sequence[Any]:
            return self.llm.generate([[10] * _PROMPT] * share, model=name, progress=False, **options)

        with ThreadPoolExecutor(len(names)) as threads:
            answers = [answer for answers in threads.map(ask, names) for answer in answers]
        seconds = median([answer.total_seconds - answer.time_to_first_token for answer in answers])
        return len(answers) * (self._tokens - 1) / seconds

    def limits(self) -> dict[str, float]:
        """The least that adapters of a step cost, each as a share of what a step has without them: `bytes` of one
        adapter to those of all weights, which counts where memory is the limit, and `flops` of a row's adapter to those
        of its products."""
        executor = self.llm._engine.executor
        specs = parameter_specs(executor.model)
        adapters = [spec for spec in specs.values() if spec.role is Role.ADAPTERS]
        one = sum(int(np.prod(spec.shape)) for spec in adapters) / ADAPTERS
        roles = (Role.MATRIX, Role.EMBEDDING) if executor.model.tie_embeddings else (Role.MATRIX,)
        matrices = sum(int(np.prod(spec.shape)) for spec in specs.values() if spec.role in roles)
        width = np.dtype(executor.served.execution.dtype).itemsize
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(executor.params)) - one * ADAPTERS * width
        return {"bytes": one * width / whole, "flops": one / matrices}


def summary(runs: Sequence[Rates], limits: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a record: medians, and the ratios to no adapter, of which each is of one repetition."""
    rows = [
        {
            "rows": count,
            "kind": kind,
            "rate": median([run[count][kind] for run in runs]),
            "ratio": median([run[count][kind] / run[count]["none"] for run in runs]),
            "limit": 1 / (1 + max(KINDS[kind] * limits["bytes"], limits["flops"] if KINDS[kind] else 0.0)),
        }
        for count in runs[0]
        for kind in runs[0][count]
    ]
    return {"rows": rows, **limits, "rank": RANK}


def show(figures: Mapping[str, Any]) -> str:
    """The figures of `summary` as Markdown."""
    words = {"none": "no adapter", "one": "one adapter for all", "eight": "eight different"}
    text = (
        f"LoRA adapters of rank {figures['rank']} for every projection: one is {figures['bytes']:.1%} of the bytes of "
        f"all weights, and {figures['flops']:.1%} of the FLOPs of a row's products. The limit is the rate beside no "
        "adapter that the larger of the two allows, with all bytes of the step's adapters read once."
    )
    rows = [
        [str(row["rows"]), words[row["kind"]], number(row["rate"]), f"{row['ratio']:.2f}x", f"{row['limit']:.2f}x"]
        for row in figures["rows"]
    ]
    return paragraphs(text, table(("rows of a step", "", "tok/s", "ratio", "limit"), rows))
