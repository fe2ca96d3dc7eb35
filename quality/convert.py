"""Converts a model folder: to another layout, to a GGUF file, or to integers that pass the quality gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig
from isthmus.model.process.files import appearing
from isthmus.model.process.progress import Stages, stages
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.transformer import Params
from isthmus.model.weights.folder import ModelFolder, open_folder
from isthmus.model.weights.hub import FolderOptions
from isthmus.model.weights.quantization import SCHEMES, check_rules, formats, quantize_params, spelt_out
from isthmus.model.weights.writer import PublishedFolder, check_gguf, write_folder, write_gguf
from isthmus.quality.calibration import quantize_on_text
from isthmus.quality.gate import GateConfig, opened
from isthmus.quality.suggest import rules_of
from isthmus.quality.texts import texts


@dataclass(frozen=True)
class ConvertConfig:
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A model folder of ours or of Hugging Face, an adapter or a GGUF file; or Org/Name in the Hugging Face cache"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder to make or, with --gguf, the file; it must not exist"""
    folder: Annotated[FolderOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=FolderOptions
    )
    to: Literal["auto", "huggingface", "isthmus"] = "auto"
    """Layout to write; auto is the one that SOURCE doesn't have, or huggingface for an adapter, which is merged"""
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Dtype of the tensors in Hugging Face's layout; source is the one in which they were published, else float32"""
    max_shard_gb: float = 5.0
    """Largest size of a file in Hugging Face's layout, in GB; more weights go into several files with an index"""
    gguf: Literal["none", "f32", "f16", "bf16", "q8_0", "q4_0"] = "none"
    """Write a GGUF file for llama.cpp, with matrices in this format (llama-quantize makes other formats from f32)"""
    quantize: str = "none"
    """Make matrices integers: int8, int6, int5 or int4 (the last three keep embedding and head in 8 bits, and int4
    attention's values in 6), or rules joined by commas, of which the first that matches a matrix decides:
    "embedding=none,.*mlp.*=int4:32,.*=int8" """
    gate: Annotated[GateConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=GateConfig)


def convert(config: ConvertConfig, console: Console) -> None:
    """Converts as configured. Raises ConfigError or CheckpointError for what can't be read or written, and
    QualityError when a quantized model is refused."""
    if config.target.exists():  # before anything takes long
        raise ConfigError(f"target: {config.target} exists already")
    if not 0 < config.max_shard_gb < 1e6:
        raise ConfigError(f"max_shard_gb={config.max_shard_gb} must be positive")
    if config.gate.windows < 1 or config.gate.calibration < 0:
        raise ConfigError(f"windows={config.gate.windows} must be at least 1, calibration at least 0")
    folder = open_folder(config.source, config.folder)
    for warning in folder.remarks:
        console.print(warning, style="yellow", markup=False)
    if config.quantize != "none":
        if config.gguf != "none":
            raise ConfigError("gguf: the file has integers of its own formats; leave out --quantize")
        return _quantize(config, folder, console)
    kind = config.to
    if folder.config.quantization:
        raise ConfigError(f"{config.source} is quantized: convert the model that it was made from")
    if kind == "auto":
        kind = "isthmus" if folder.family is not None and folder.adapter is None else "huggingface"
    if config.gguf != "none":
        if config.to != "auto" or config.dtype != "source":
            raise ConfigError("gguf: it decides layout and dtype; leave out --to and --dtype")
        _to_gguf(config, folder, console)
        return _report(config, folder, console)
    with appearing(config.target) as partial, stages(console) as shown:
        partial.mkdir()
        if kind == "huggingface":
            _to_huggingface(config, folder, partial, shown)
        else:
            _to_isthmus(folder, partial, shown)
    _report(config, folder, console)


def _report(config: ConvertConfig, folder: ModelFolder, console: Console) -> None:
    files = [config.target] if config.target.is_file() else config.target.rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    console.print(
        f"{config.target}: {folder.config.parameters / 1e6:.1f}M parameters, {size / 1e9:.2f} GB", highlight=False
    )


def _to_huggingface(config: ConvertConfig, folder: ModelFolder, target: Path, shown: Stages) -> None:
    plain = folder.with_config(lora=LoraConfig())
    published = PublishedFolder(plain, config.dtype)
    params = _read(plain, shown)
    writing = shown.begin("writing", published.nbytes)
    published.write(target, params, int(config.max_shard_gb * 1e9), writing.advance)


def _to_gguf(config: ConvertConfig, folder: ModelFolder, console: Console) -> None:
    plain = folder.with_config(lora=LoraConfig())
    check_gguf(plain)
    try:
        with appearing(config.target) as partial, stages(console) as shown:
            params = _read(plain, shown)
            writing = shown.begin("writing", 4 * plain.config.parameters)
            write_gguf(partial, plain, params, config.gguf, writing.advance)
    except OSError as error:
        raise ConfigError(f"target: {config.target} can't be written: {error.strerror or error}") from None


def _to_isthmus(folder: ModelFolder, target: Path, shown: Stages) -> None:
    plain = folder.with_config(lora=LoraConfig())
    _write(plain, _read(plain, shown), target, shown)


def _write(folder: ModelFolder, params: Params, target: Path, shown: Stages) -> None:
    shown.say(f"writing {sum(array.nbytes for array in jax.tree.leaves(params)) / 1e9:.2f} GB")
    write_folder(target, folder, params)


def _quantize(config: ConvertConfig, folder: ModelFolder, console: Console) -> None:
    """Writes a quantized model. Raises QualityError when it is too far from the original and is not forced."""
    if config.to == "huggingface":
        raise ConfigError("quantize: a quantized model is written in our own layout; leave out --to huggingface")
    if folder.config.quantization:
        raise ConfigError(f"{config.source} is quantized already: convert the model that it was made from")
    plain = folder.with_config(lora=LoraConfig())
    if config.quantize not in SCHEMES:
        check_rules(plain.config, rules_of(config.quantize))
    fitted = any(chosen.bits < 8 for chosen in formats(plain.config, rules_of(config.quantize)).values())
    sample = texts(config.gate, plain, config.gate.calibration if fitted else 0)
    for warning in sample.warnings:
        console.print(warning, style="yellow", markup=False)
    with appearing(config.target) as partial, stages(console) as shown:
        partial.mkdir()

        def write(rules: Sequence[str], target: Path) -> None:
            params = _read(plain, shown)
            chosen = formats(plain.config, rules)
            if len(sample.calibration) and any(each.bits < 8 for each in chosen.values()):
                fitting = shown.begin("fitting integers to the text", len(chosen), "matrices")
                quantize_on_text(plain.config, params, rules, sample.calibration, fitting.advance)
            else:
                quantizing = shown.begin("quantizing", None)
                quantize_params(plain.config, params, rules, quantizing.advance)
            _write(plain.with_config(quantization=spelt_out(plain.config, rules)), params, target, shown)

        with opened(config.gate, plain, sample.comparison, partial, shown, console) as gate:
            gate.write(config.quantize, write)
    _report(config, folder, console)


def _read(folder: ModelFolder, shown: Stages) -> Params:
    reading = shown.begin("reading", folder.nbytes or None)
    params = folder.load_params(build_mesh(MeshShape()), None, reading.advance)
    reading.finish()
    return params
