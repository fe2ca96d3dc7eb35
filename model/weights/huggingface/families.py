"""The supported families. For each, a published config.json is read as a ModelConfig. One network computes them all."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.weights.huggingface import readers, tensors
from isthmus.model.weights.huggingface.coded.method import Method, read_method
from isthmus.model.weights.huggingface.fields import Fields


@dataclass(frozen=True)
class Family:
    """How models with one `model_type` are read."""

    architecture: str
    """The only name that `architectures` of config.json may hold"""
    read: Callable[[Fields], dict[str, Any]]
    """Returns the fields of ModelConfig"""
    table: Callable[[ModelConfig], tensors.Table]
    """Returns the table that says where the parameters lie"""
    method: Method | None = None
    """How a folder's matrices are stored, where they are codes and scales; None means plain numbers"""


def read_config(path: Path, ignore: Collection[str] = ()) -> tuple[Family, ModelConfig]:
    """Reads a published config.json. ignore: fields that are read as if they were absent.

    Raises ConfigError for an unknown architecture, or for a field that isn't supported and may change what the model
    computes.
    """
    return read_fields(Fields.load(path, ignore))


def read_fields(fields: Fields) -> tuple[Family, ModelConfig]:
    """Reads the fields of a published config.json, as read_config does. fields.warnings then says which it ignored."""
    model_type = fields.raw("model_type", None)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise fields.error("model_type", f"is none of the known families: {', '.join(FAMILIES)}")
    fields.among("architectures", ([family.architecture], None), None)
    config = ModelConfig(**family.read(fields))
    if not fields.was_read("layer_types"):
        kinds = ["sliding_attention" if kind.window else "full_attention" for kind in config.layer_kinds]
        fields.agrees("layer_types", kinds, "what the other fields say of the layers")
    method = read_method(fields)
    fields.finish(model_type)
    try:
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{fields.path}: {error}") from None
    return replace(family, method=method), config


def _named(table: tensors.Table) -> Callable[[ModelConfig], tensors.Table]:
    return lambda config: table


def _deepseek_table(config: ModelConfig) -> tensors.Table:
    return tensors.DEEPSEEK if config.latent.query_rank else tensors.DEEPSEEK_WHOLE_QUERY


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", readers.llama, _named(tensors.LLAMA)),
    "mistral": Family("MistralForCausalLM", readers.mistral, _named(tensors.LLAMA)),
    "mixtral": Family("MixtralForCausalLM", readers.mixtral, _named(tensors.MIXTRAL)),
    "qwen2": Family("Qwen2ForCausalLM", readers.qwen2, _named(tensors.LLAMA)),
    "qwen3": Family("Qwen3ForCausalLM", readers.qwen3, _named(tensors.LLAMA)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", readers.qwen3_moe, _named(tensors.QWEN3_MOE)),
    "gemma2": Family("Gemma2ForCausalLM", readers.gemma2, _named(tensors.GEMMA)),
    "gemma3_text": Family("Gemma3ForCausalLM", readers.gemma3, _named(tensors.GEMMA)),
    "phi3": Family("Phi3ForCausalLM", readers.phi3, _named(tensors.PHI3)),
    "olmo2": Family("Olmo2ForCausalLM", readers.olmo2, _named(tensors.OLMO2)),
    "smollm3": Family("SmolLM3ForCausalLM", readers.smollm3, _named(tensors.LLAMA)),
    "gpt_oss": Family("GptOssForCausalLM", readers.gpt_oss, _named(tensors.GPT_OSS)),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", readers.deepseek_v2, _deepseek_table),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", readers.deepseek_v3, _deepseek_table),
}
"""The families by `model_type` of config.json."""
