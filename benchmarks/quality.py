"""`isthmus bench quality`: what integers, ours and llama.cpp's, cost a model, by the same text and float32
predictions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from isthmus.benchmarks.case import Bench, Qualities, Tick, progress_bar
from isthmus.benchmarks.figures import listed, number, paragraphs, table_of
from isthmus.benchmarks.llama_perplexity import BaseLogits, divergence, write_base
from isthmus.benchmarks.machine import describe
from isthmus.benchmarks.processes import BenchError
from isthmus.benchmarks.record import Record, results_folder
from isthmus.errors import ConfigError
from isthmus.model.parameter import Dtype
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.process.resources import usable_cpus
from isthmus.model.weights.folder import ModelFolder, open_folder
from isthmus.model.weights.quantization import SCHEMES, weight_bytes
from isthmus.quality import corpus
from isthmus.quality.compare import compare
from isthmus.quality.divergence import Divergence, Quality
from isthmus.serve.engine.build import open_model

KIND = "quality"
"""The name of this benchmark's records"""


@dataclass(frozen=True)
class QualityBench(Bench):
    """Measures how far the predictions of quantized models, ours and llama.cpp's, are from the float32 model's.

    llama-perplexity predicts a text with the F32 file, in windows of which the second half counts, and compares
    llama.cpp's other types with that. Our models are compared with the same predictions, by the same definition, and
    computed as `isthmus serve` does: with its cache, its kernels and its integers.
    """

    model: Path = Path("models/125m")
    """A model folder in Hugging Face's layout, of a trained model: give one. The default is only where peers and
    peer-servers look for theirs, which make_models.py fills with random weights, whose figures mean nothing"""
    kinds: tuple[str, ...] = ("none", "int8", "int4")
    """Our schemes to measure, as for `isthmus serve --quantize`"""
    folders: tuple[str, ...] = ()
    """NAME=FOLDER: a folder that `isthmus convert --quantize` made of the same model, and its name in the table"""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16", "float32")
    """Dtypes in which each of ours is measured: of activations, and of weights that aren't integers"""
    cache_dtype: Literal["model", "float32", "bfloat16", "int8"] = "model"
    """Dtype of our keys and values; llama.cpp's are float16"""
    types: tuple[str, ...] = ("bf16", "q8_0", "q6_K", "q5_K_M", "q4_K_M", "q4_K_S", "q4_0")
    """llama.cpp's types to measure"""
    peer: Path = Path(".peers-llama")
    """The folder with llama.cpp's bin"""
    gguf: Path | None = None
    """The folder in which make_gguf.py put the model's files, f32 among them; by default, the one that --model is in"""
    text: Path | None = None
    """A file of text; by default, the half of a text from Python (quality/corpus.py) on which nothing is calibrated"""
    windows: int = 24
    """How many windows of the text are predicted"""
    n_ctx: int = 512
    """Tokens of a window"""
    base: Path | None = None
    """A file for llama-perplexity's F32 predictions: if it exists, it is used, else it is written and kept"""
    merge: bool = False
    """Keep those rows of the result's file that aren't measured now; otherwise the file is replaced"""

    def validate(self) -> None:
        self.check_least(windows=1, n_ctx=8)
        if not (self.model / "config.json").is_file():
            raise ConfigError(f"model: {self.model} has no config.json; name the folder of a trained model")
        if not (self.kinds or self.folders or self.types):
            raise ConfigError("kinds, folders and types are empty: nothing to measure")
        if not self.dtypes:
            raise ConfigError("dtypes must name at least one")
        for given in self.folders:
            name, _, path = given.partition("=")
            if not name or not path:
                raise ConfigError(f"folders: {given!r} must be NAME=FOLDER")

    def file(self, kind: str) -> Path:
        """The model's file in one of llama.cpp's types. Raises BenchError when it doesn't exist."""
        model = self.model.resolve()
        path = (self.gguf or model.parent) / f"{model.name}-{kind}.gguf"
        if not path.is_file():
            raise BenchError(f"{path} does not exist: make_gguf.py {self.peer} {self.model} {kind} makes it")
        return path


@dataclass(frozen=True)
class Ours:
    """A row of the result that we compute."""

    kind: str
    dtype: Literal["float32", "bfloat16"]
    folder: Path
    quantize: str

    @property
    def name(self) -> str:
        """The row's name: in bfloat16 it is the name of the stack that other benchmarks time (stacks.py)."""
        kind = {"none": {"bfloat16": "bf16", "float32": "f32"}[self.dtype]}.get(self.kind, self.kind)
        return f"isthmus-{kind}" + ("-f32" if self.dtype == "float32" and self.kind != "none" else "")


def ours(bench: QualityBench) -> list[Ours]:
    """Our rows, in the order in which they are measured."""
    found = [(kind, bench.model, kind) for kind in bench.kinds]
    found += [(name, Path(path), "none") for name, _, path in (given.partition("=") for given in bench.folders)]
    return [Ours(kind, dtype, folder, quantize) for kind, folder, quantize in found for dtype in bench.dtypes]


# how far our predictions are from those in a base file


@dataclass(frozen=True)
class ServedQuality(Quality):
    """How far a model's predictions moved, and the size of its weights."""

    bytes: int
    """Bytes of the weights, as serving keeps them"""


def measure(
    model: Path, quantize: str, dtype: Dtype | Literal["auto"], cache_dtype: str, base: Path, tick: Tick = lambda: None
) -> ServedQuality:
    """Compares a folder's predictions of a base file's tokens with those in the file. They are computed as `isthmus
    serve` computes: with its paged cache, kernels, dtypes and integers. tick() is called after each window.

    quantize: a scheme of model/weights/quantization.py, or rules joined by commas; "none" for a folder that is
    quantized already, or is to be measured in `dtype`. dtype, cache_dtype: as for `isthmus serve`. Raises ConfigError.
    """
    folder = open_model(model, dtype, quantize=quantize if quantize in SCHEMES else "none")
    if quantize not in SCHEMES:
        folder = dataclasses.replace(folder, quantize=tuple(quantize.split(",")))
    size = weight_bytes(folder.config, folder.execution.dtype, folder.quantize or folder.config.quantization)
    file = BaseLogits.open(base)
    if file.vocab != folder.config.vocab_size:
        raise ConfigError(f"base: {base} has a vocabulary of {file.vocab}, {model} of {folder.config.vocab_size}")
    if file.n_ctx > folder.config.context_length:
        raise ConfigError(f"base: {base} has windows of {file.n_ctx}, {model} takes {folder.config.context_length}")
    quality = compare(file, folder, cache_dtype, windows(folder, file), tick)
    return ServedQuality(**vars(quality), bytes=size)


def windows(folder: ModelFolder, file: BaseLogits) -> np.ndarray:
    """int32[windows, n_ctx]: the file's tokens as llama.cpp gives them to the model. If the tokenizer begins a text
    with a token of its own, every window begins with that."""
    tokens = file.tokens.copy()
    if folder.tokenizer.encode("")[:1] == [int(tokens[0, 0])]:
        tokens[:, 0] = tokens[0, 0]
    return tokens


# the whole measurement


def run(bench: QualityBench, console: Console) -> Record:
    """Measures and returns the record, added to the result's file if --merge is set. Raises ConfigError, BenchError."""
    open_folder(bench.model)
    machine = describe()
    files = {kind: bench.file(kind) for kind in bench.types}
    with temporary_folder("isthmus-bench-") as folder:
        text = bench.text or corpus.write(folder)["evaluation"]
        base = _base(bench, text, folder, console)
        rows = list(_rows(bench, base, files, console))
        figures = {
            "python": machine.python,
            "windows": base.windows,
            "n_ctx": base.n_ctx,
            "text": "corpus" if bench.text is None else str(bench.text),
            # Two records have the same digest if the same tokenizer encoded the same text.
            "sha256": hashlib.sha256(base.tokens.tobytes()).hexdigest(),
            "rows": rows,
        }
    record = Record(KIND, bench.model.resolve().name, machine, dataclasses.asdict(bench), figures)
    return _merged(record, results_folder(bench.out)) if bench.merge else record


def _base(bench: QualityBench, text: Path, folder: Path, console: Console) -> BaseLogits:
    path = bench.base or folder / "base.bin"
    if not path.is_file():
        source = bench.file("f32")
        console.print(f"llama-perplexity: predicting with {source}", highlight=False)
        write_base(bench.peer, source, text, path, bench.windows, bench.n_ctx, usable_cpus())
    return BaseLogits.open(path)


def _rows(bench: QualityBench, base: BaseLogits, files: dict[str, Path], console: Console) -> Iterator[dict[str, Any]]:
    """Yields the rows. Each is printed as soon as it is known, so that a run that is stopped has shown something."""
    for kind, path in files.items():
        size, tensors = stored(path)
        found = divergence(bench.peer, path, base, usable_cpus())
        yield _row(f"llama-{kind}", found, {"bytes": size, "tensors": tensors}, console)
    for each in ours(bench):
        with progress_bar(console, each.name, base.windows) as tick:
            quality = measure(each.folder, each.quantize, each.dtype, bench.cache_dtype, base.path, tick)
        yield _row(each.name, quality, {"dtype": each.dtype, "cache_dtype": bench.cache_dtype}, console)


def _row(name: str, found: Divergence, facts: dict[str, Any], console: Console) -> dict[str, Any]:
    console.print(f"{name}: KL {number(found.kl)} ± {number(found.kl_error, 2)}", highlight=False)
    return {"name": name, **dataclasses.asdict(found), "ratio": found.ratio, **facts}


def stored(path: Path) -> tuple[int, dict[str, int]]:
    """The bytes of a GGUF file's tensors, and the number of tensors of each type."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors), dict(Counter(t.tensor_type.name for t in tensors))


def _merged(record: Record, folder: Path) -> Record:
    """Returns `record` with those rows of the file it would replace that it has not measured. Raises ConfigError when
    they were measured on another text."""
    before = record.predecessor(folder)
    if before is None:
        return record
    for name in ("sha256", "windows", "n_ctx"):
        if before.figures[name] != record.figures[name]:
            raise ConfigError(f"merge: {record.stem}.json in {folder} was measured on another text: {name} differs")
    rows = {row["name"]: row for row in (*before.figures["rows"], *record.figures["rows"])}
    return record.with_figures(rows=list(rows.values()))


def show(record: Record, _: Qualities) -> str:
    figures, rows = record.figures, record.figures["rows"]
    count = figures["windows"] * (figures["n_ctx"] - 1 - figures["n_ctx"] // 2)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: row["name"],
        "MB": lambda row: f"{row['bytes'] / 1e6:,.1f}",
        "KL": lambda row: number(row["kl"]),
        "±": lambda row: number(row["kl_error"], 2),
        "top-1": lambda row: f"{row['top1']:.1%}",
        "perplexity": lambda row: f"{row['ratio'] - 1:+.2%}",
    }
    cells = table_of(sorted(rows, key=lambda row: row["bytes"]), columns)
    text = (
        f"KL is the divergence from llama.cpp's float32 predictions, in nats per token, over {count:,} tokens: the "
        f"second halves of {figures['windows']} windows of {figures['n_ctx']}. ± is its standard error; top-1 is the "
        "share of tokens with the same likeliest next one; perplexity is compared with float32's. Ours are as served, "
        "with activations in bfloat16 or, if named -f32, in float32. MB counts the weights as they are kept, and "
        "nothing else of a file."
    )
    tensors = [
        f"{row['name']}: {', '.join(f'{count} {kind}' for kind, count in row['tensors'].items())}"
        for row in rows
        if row.get("tensors")
    ]
    named = ["What llama.cpp's names mean for this model's sizes, tensors by type:", listed(tensors)] if tensors else []
    return paragraphs(text, cells, *named)


def known(records: Sequence[Record]) -> Qualities:
    """The KL divergences in the quality records, by model and stack. Models are in the records' order."""
    return {r.subject: {row["name"]: row["kl"] for row in r.figures["rows"]} for r in records if r.kind == KIND}


def costs(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """What integers cost, as quality/costs.py reads it: {scheme: {dtype: {model: fields of Cost}}}."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in (record for record in records if record.kind == KIND):
        for row in record.figures["rows"]:
            scheme = row["name"].removeprefix("isthmus-").removesuffix("-f32")
            if scheme not in SCHEMES or row["cache_dtype"] != "model":
                continue
            found.setdefault(scheme, {}).setdefault(row["dtype"], {})[record.subject] = {
                "kl": row["kl"],
                "kl_error": row["kl_window_error"],
                "ratio": row["ratio"],
                "ratio_error": row.get("ratio_window_error"),
                "top1": row["top1"],
                "tokens": row["tokens"],
                "dtype": row["dtype"],
                "cache_dtype": row["dtype"],
            }
    return found
