"""`isthmus convert`."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig
from isthmus.model.process.cleaning import temporary_folder
from isthmus.model.process.files import present, read_json
from isthmus.model.process.progress import Stages, stages
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer
from isthmus.model.transformer import Params
from isthmus.model.weights.checkpoint import QUANTIZATION, CheckpointError, Checkpoints
from isthmus.model.weights.companions import copy_companions
from isthmus.model.weights.folder import PUBLISHED_CONFIG, ModelFolder, copy_published_config, open_folder
from isthmus.model.weights.hub import FolderOptions
from isthmus.model.weights.huggingface.coded.method import FIELD as CODED
from isthmus.model.weights.huggingface.export import DTYPES_FILE, published_config, stored_dtypes
from isthmus.model.weights.huggingface.families import Family, read_config, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from isthmus.model.weights.quantization import SCHEMES, check_rules, formats, quantize_params, spelt_out
from isthmus.quality.calibration import quantize_on_text
from isthmus.quality.gate import GateConfig, QualityError, opened
from isthmus.quality.suggest import rules_of
from isthmus.quality.texts import texts

HELP = """Converts a model folder between Hugging Face's layout and ours. Weights come out bit for bit as they went in.

examples:
  isthmus convert runs/mine exported               # a trained model, for transformers and all who read its layout
  isthmus convert runs/adapter merged              # a LoRA adapter, merged into its base model
  isthmus convert Llama-3.2-1B llama --to isthmus  # a published folder; serving and --init read it as it is, too
  isthmus convert runs/mine mine.gguf --gguf q8_0  # one file, for llama.cpp
  isthmus convert Llama-3.2-1B small --quantize int4 --text prose.txt  # matrices of integers, and what that costs

TARGET must not exist. It appears when all of it is written."""


@dataclass(frozen=True)
class ConvertConfig:
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A model folder of either kind, an adapter or a GGUF file; or Org/Name, in the local Hugging Face cache"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder to make, or with --gguf the file"""
    folder: Annotated[FolderOptions, tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction] = field(
        default_factory=FolderOptions
    )
    to: Literal["auto", "huggingface", "isthmus"] = "auto"
    """auto: the other kind; a merged adapter becomes huggingface"""
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Of the tensors written in Hugging Face's layout; source is what they were published in, else float32"""
    max_shard_gb: float = 5.0
    """Most of a file, in GB; more weights go into several, with an index"""
    gguf: Literal["none", "f32", "f16", "bf16", "q8_0", "q4_0"] = "none"
    """Write one GGUF file, for llama.cpp, with matrices of this kind (its llama-quantize makes others of f32)"""
    quantize: str = "none"
    """int8, int6, int5 or int4 (the last three keep embedding and head in 8 bits, int4 attention's values in 6), or
    rules of one's own, joined by commas, the first that matches deciding: "head=none,.*mlp.*=int4:32,.*=int8" """
    gate: Annotated[GateConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=GateConfig)


def convert(config: ConvertConfig, console: Console) -> None:
    """Raises ConfigError or CheckpointError for what can't be read or written."""
    if config.target.exists():
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
            raise ConfigError("gguf: it has kinds of integers of its own; leave out --quantize")
        return _quantize(config, folder, console)
    kind = config.to
    if folder.config.quantization:
        raise ConfigError(f"{config.source} is quantized: convert the model that it was made from")
    if kind == "auto":
        kind = "isthmus" if folder.family is not None and folder.adapter is None else "huggingface"
    if config.gguf != "none":
        if config.to != "auto" or config.dtype != "source":
            raise ConfigError("gguf: it says what is written; leave out --to and --dtype")
        _to_gguf(config, folder, console)
        return _report(config, folder, console)
    with _appearing(config.target) as partial, stages(console) as shown:
        partial.mkdir()
        if kind == "huggingface":
            _to_huggingface(config, folder, partial, shown)
        else:
            _to_isthmus(folder, partial, shown)
    _report(config, folder, console)


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write to, or a place for a file, which takes its own name once all is written: whoever else converts
    to the same name has one too. Raises ConfigError where nothing can be made, or the name is taken meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            if not target.parent.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
            made = stack.enter_context(temporary_folder(f"{target.name}.partial-", target.parent)) / target.name
        except OSError as error:
            raise ConfigError(f"target: {target} can't be made: {_reason(error)}") from None
        yield made
        if target.exists():
            raise ConfigError(f"target: {target} was made by somebody else meanwhile")
        made.rename(target)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _report(config: ConvertConfig, folder: ModelFolder, console: Console) -> None:
    files = [config.target] if config.target.is_file() else config.target.rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    console.print(
        f"{config.target}: {folder.config.parameters / 1e6:.1f}M parameters, {size / 1e9:.2f} GB", highlight=False
    )


def _to_huggingface(config: ConvertConfig, folder: ModelFolder, target: Path, shown: Stages) -> None:
    from isthmus.model.weights.huggingface.export import weight_bytes, write_weights

    family, values = _published(folder)
    dtypes = _dtypes(config.dtype, folder)
    plain = folder.with_config(lora=LoraConfig())
    params = _read(plain, shown)
    writing = shown.begin("writing", weight_bytes(plain.config, family, dtypes))
    limit = int(config.max_shard_gb * 1e9)
    write_weights(target, family, plain.config, params, dtypes, limit, writing.advance)
    stored = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    values = {name: value for name, value in values.items() if name not in ("torch_dtype", CODED)}
    values["dtype"] = stored[dtypes[""]]
    (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    _copy_companions(folder, target)
    if folder.family is None and not (folder.path / PUBLISHED_CONFIG).is_file():
        _describe_tokenizer(folder.tokenizer, target)


def _to_gguf(config: ConvertConfig, folder: ModelFolder, console: Console) -> None:
    """All of it is written before it takes its own name."""
    from isthmus.model.weights.gguf.export import architecture_name, write_model

    family, values = _published(folder)
    architecture_name(values["model_type"])
    plain = folder.with_config(lora=LoraConfig())
    try:
        with _appearing(config.target) as partial, stages(console) as shown:
            params = _read(plain, shown)
            writing = shown.begin("writing", 4 * plain.config.parameters)
            write_model(partial, plain, values["model_type"], family, params, config.gguf, writing.advance)
    except OSError as error:
        raise ConfigError(f"target: {config.target} can't be written: {_reason(error)}") from None


def _published(folder: ModelFolder) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json to write. Raises ConfigError when the network is no family's."""
    kept = folder.path / ("config.json" if folder.family is not None else PUBLISHED_CONFIG)
    if not kept.is_file():
        values = published_config(folder.config)
        return read_fields(Fields(values, kept))[0], values
    family, read = read_config(kept, folder.ignore_field)
    if not read.computes_as(folder.config):
        raise ConfigError(f"{kept} describes another network than {folder.path / 'config.json'}")
    return family, read_json(kept)


def _dtypes(wanted: str, folder: ModelFolder) -> dict[str, str]:
    """See model/weights/huggingface/export.py: stored_dtypes."""
    if wanted != "source":
        return {"": {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[wanted]}
    if folder.weights is not None:
        return stored_dtypes(folder.weights)
    kept = folder.path / DTYPES_FILE
    return read_json(kept) if present(kept) else {"": "F32"}


def _to_isthmus(folder: ModelFolder, target: Path, shown: Stages) -> None:
    plain = folder.with_config(lora=LoraConfig())
    _write_isthmus(plain, _read(plain, shown), target, shown)


def _quantize(config: ConvertConfig, folder: ModelFolder, console: Console) -> None:
    """Raises QualityError when the result is too far from the original, and is not forced."""
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
    with _appearing(config.target) as partial, stages(console) as shown:
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
            _write_isthmus(plain.with_config(quantization=spelt_out(plain.config, rules)), params, target, shown)

        with opened(config.gate, plain, sample.comparison, partial, shown, console) as gate:
            gate.write(config.quantize, write)
    _report(config, folder, console)


def _write_isthmus(folder: ModelFolder, params: Params, target: Path, shown: Stages) -> None:
    shown.say(f"writing {sum(array.nbytes for array in jax.tree.leaves(params)) / 1e9:.2f} GB")
    checkpoints = Checkpoints(target)
    checkpoints.save(0, params, None, {"step": 0, "tokens": 0, QUANTIZATION: list(folder.config.quantization)})
    checkpoints.close()
    folder.config.save(target / "config.json")
    _copy_companions(folder, target)
    if folder.weights is not None:
        copy_published_config(folder.path, target)
        (target / DTYPES_FILE).write_text(json.dumps(stored_dtypes(folder.weights), indent=2) + "\n")
        return
    for name in (PUBLISHED_CONFIG, DTYPES_FILE):  # of the model that ours was made from
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, target / name)


def _copy_companions(folder: ModelFolder, target: Path) -> None:
    """An adapter's own go over its base model's, as when it is served."""
    copy_companions(folder.path, target)
    if folder.adapter is not None:
        copy_companions(folder.adapter, target)


def _read(folder: ModelFolder, shown: Stages) -> Params:
    reading = shown.begin("reading", folder.nbytes or None)
    params = folder.load_params(build_mesh(MeshShape()), None, reading.advance)
    reading.finish()
    return params


def _describe_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
    """What transformers needs to open a tokenizer that was trained here."""
    assert tokenizer.eos_id is not None, "training always makes one"
    token = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **token}
    (target / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    (target / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def main(argv: Sequence[str]) -> int:
    config = tyro.cli(ConvertConfig, args=list(argv), description=HELP, prog="isthmus convert")
    console = Console(soft_wrap=True)
    try:
        convert(config, console)
    except (ConfigError, CheckpointError, QualityError, OSError) as error:
        console.print(f"isthmus convert: {error}", style="red", markup=False)
        return 2
    return 0
