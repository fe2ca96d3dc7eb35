"""Says which fields of a config.json can change what a model computes. tests/parity/make_config_golden.py finds this
out from transformers' own classes and writes known_fields.json. The tables here add what publishers write."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

_BY_NAME = re.compile(r"^_|token_ids?$|token_index$|(^|_)name$|name_or_path$|(^|_)version$")
"""Names of fields that hold notes of the library that wrote the file, ids of tokens, names or versions."""

_PUBLISHERS = {
    "auto_map", "is_llama_config", "task_specific_params", "tokenizer_class", "transformers.js_config", "unsloth_fixed",
}  # fmt: skip
"""Fields that are meant for other programs. Code that `auto_map` names is never loaded."""

_OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "full_attn_mod": (1,),
    "hidden_dropout": (0, 0.0),
    "interpolate_factor": (1,),
    "is_decoder": (False, True),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False, True),
    "use_bfloat16": (False, True),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
"""Fields that transformers 4 wrote for every model, or that makers of the families here publish, with the values that
have no effect."""


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("known_fields.json").read_text(encoding="utf-8"))
    return table


@cache
def changing(model_type: str) -> frozenset[str]:
    """The fields of transformers' class for a family that can change the family's logits."""
    return frozenset(_table()["families"].get(model_type, {}).get("changes", ()))


@cache
def _changing_nothing(model_type: str) -> frozenset[str]:
    """The fields that can't change a family's logits: those of its own class, those of other classes that change no
    family, and those that are no part of a model."""
    nothing = {family: frozenset(found["changes nothing"]) for family, found in _table()["families"].items()}
    elsewhere = frozenset().union(*nothing.values()) - _changing_some()
    return elsewhere | nothing.get(model_type, frozenset()) | frozenset(_table()["no part of a model"]) | _PUBLISHERS


@cache
def _changing_some() -> frozenset[str]:
    """The fields that can change the logits of some family."""
    return frozenset(name for family in _table()["families"] for name in changing(family))


def is_harmless(model_type: str, name: str, value: Any) -> bool:
    """Whether a field with this value can't change the logits of a family."""
    if name in changing(model_type):
        return False
    known = name in _changing_nothing(model_type) or _BY_NAME.search(name) is not None
    return known or any(value == off and type(value) is type(off) for off in _OFF.get(name, ()))


def is_off(model_type: str, name: str, value: Any) -> bool:
    """Whether the value of a field that a family doesn't have says that the field isn't used: null, false, 0, 1, "", []
    or {}. A 1 doesn't say so where the field can change another family's logits, because it may ask for something
    there."""
    if name in changing(model_type):
        return False
    if type(value) in (int, float) and value == 1:
        return name not in _changing_some()
    return value is None or value is False or (type(value) in (int, float) and value == 0) or value in ("", [], {})
