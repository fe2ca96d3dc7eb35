"""Run by the peers' Python: what transformers makes of config.json, in two files.

    python tests/parity/make_config_golden.py [--out DIR]

config_variants.json: of each change in config_variants.py whether transformers takes it, which earlier change computes
the same, and its rotary frequencies. known_fields.json: which fields can change the logits of a family, found by
changing each of them; which can't; and the names of all that is no part of a model: settings of training, generation,
tokenizers. The second is read by model/weights/huggingface/known.py.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import inspect
import json
import logging
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from config_variants import ABSENT, BASES, changed, variants
from weights import random_tensors

HERE = Path(__file__).resolve().parent
TOKENS = 40
MOST_PARAMETERS = 30_000_000
"""Of a model that is run; one that a default made larger is only built, without memory"""


@dataclasses.dataclass
class Outcome:
    """What a configuration computes."""

    logits: Any
    """float64[tokens, vocab]; or of a model too large, its parameters' shapes"""
    ropes: dict[str, tuple[list[float], float]]
    """By kind of layer, or "" for all: the frequencies, and what multiplies cos and sin"""


def base_of(model_type: str) -> dict[str, Any]:
    return json.loads((HERE / "golden" / BASES[model_type] / "config.json").read_text(encoding="utf-8"))


def config_class(model_type: str) -> Any:
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]


def outcome(values: dict[str, Any]) -> Outcome | None:
    """None where transformers refuses, be it with a sentence or a crash."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(values))
            config = transformers.AutoConfig.from_pretrained(folder)
        config._attn_implementation = config._experts_implementation = "eager"
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        ropes = rope_numbers(type(model.model.rotary_emb)(config))
        if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
            return Outcome({name: tuple(each.shape) for name, each in model.state_dict().items()}, ropes)
        return Outcome(run(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).double().eval()), ropes)
    except Exception:
        return None


def rope_numbers(rope: Any) -> dict[str, tuple[list[float], float]]:
    kinds = getattr(rope, "layer_types", None)
    if kinds is None:
        return {"": (rope.inv_freq.tolist(), float(rope.attention_scaling))}
    return {
        kind: (getattr(rope, f"{kind}_inv_freq").tolist(), float(getattr(rope, f"{kind}_attention_scaling")))
        for kind in kinds
    }


@torch.no_grad()
def run(model: Any) -> np.ndarray:
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    random = {name: torch.from_numpy(array).double() for name, array in random_tensors(shapes, 0).items()}
    model.load_state_dict(random, strict=False)
    model.tie_weights()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 90, (1, TOKENS)))
    logits = model(tokens, use_cache=False).logits[0].numpy()
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return logits


def same(one: Outcome, other: Outcome) -> bool:
    if isinstance(one.logits, dict) or isinstance(other.logits, dict):
        return isinstance(one.logits, dict) and isinstance(other.logits, dict) and one == other
    return one.logits.shape == other.logits.shape and np.allclose(one.logits, other.logits, rtol=1e-9, atol=1e-9)


def golden_variants(model_type: str, declared: list[str]) -> dict[str, Any]:
    """Of each change by name: null where transformers refuses it, else the first that computes the same; and of each
    first its rotary frequencies."""
    base, firsts, found = base_of(model_type), {}, {}
    for name, change in variants(model_type, base, declared).items():
        result = outcome(changed(base, copy.deepcopy(change)))
        found[name] = None
        if result is not None:
            found[name] = next((first for first, known in firsts.items() if same(known, result)), name)
            firsts.setdefault(found[name], result)
    assert found["plain"] == "plain", model_type
    ropes = {
        name: {kind: [rounded(numbers), factor] for kind, (numbers, factor) in firsts[name].ropes.items()}
        for name in firsts
        if name.startswith(("plain", "rope: "))
    }
    return {"same as": found, "ropes": ropes}


def rounded(numbers: list[float]) -> list[float]:
    return [float(f"{number:.8g}") for number in numbers]


# Which fields can change the logits

SHADOWS = {
    **dict.fromkeys(("layer_types", "num_local_experts", "no_rope_layers"), ABSENT),
    "use_sliding_window": True,
    "topk_method": "group_limited_greedy",
    "n_group": 2,
    "topk_group": 1,
    "max_window_layers": 1,
    "sliding_window": 5,
}
"""Beside some fields' usual values others have no effect; so each is tried with these too"""


FLIPPED = {0: 1, 1: 0, "full_attention": "sliding_attention", "sliding_attention": "full_attention"}


def others(value: Any) -> list[Any]:
    """Values of the same type, or of any where that isn't known."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2 + 2, 1]
    if isinstance(value, float):
        return [value + 0.25, value * 2 + 0.5]
    if isinstance(value, str):
        return ["gelu", "eager", "x"]
    if isinstance(value, list):
        return [value[1:], [*value, *value], [FLIPPED.get(item, item) for item in value]]
    if isinstance(value, dict):
        return [{}, {"rope_type": "linear", "factor": 2.0}]
    return [True, 1, 0.5, "x", [1], {"0": "x"}]


def has_effect(model_type: str, name: str, default: Any) -> bool:
    """Whether some value gives other logits than its default, or none gives any."""
    base = base_of(model_type)
    known = {field: value for field, value in SHADOWS.items() if field in base or field in defaults_of(model_type)}
    tried = []
    for start in (base, changed(base, {field: value for field, value in known.items() if field != name})):
        plain = outcome(start)
        results = [outcome({**start, name: value}) for value in others(start.get(name, default))]
        tried += [same(plain, result) for result in results if plain is not None and result is not None]
    return not tried or not all(tried)


def defaults_of(model_type: str) -> dict[str, Any]:
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config_class(model_type))
    }


def popped(function: Any) -> set[str]:
    """The names that a function takes out of its keyword arguments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("pop", "get")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "kwargs"
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def no_part_of_a_model() -> list[str]:
    """What the base class of all configurations declares, and settings of generation, training and tokenizers, which
    people's tools leave in config.json."""
    from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainingArguments

    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    generation = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    training = {field.name for field in dataclasses.fields(TrainingArguments)}
    tokenizer = popped(PreTrainedTokenizerBase.__init__) | set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    return sorted(
        common | popped(transformers.PreTrainedConfig.__post_init__) - ROPE | generation | training | tokenizer
    )


ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor", "per_layer_config"}
"""What the base class reads of the model itself"""


def known_fields() -> dict[str, Any]:
    everywhere = no_part_of_a_model()
    families = {}
    for model_type in BASES:
        own = {name: value for name, value in defaults_of(model_type).items() if name not in everywhere}
        effect = {name: has_effect(model_type, name, default) for name, default in sorted(own.items())}
        families[model_type] = {
            "changes": [name for name in effect if effect[name]],
            "changes nothing": [name for name in effect if not effect[name]],
        }
    return {"transformers": transformers.__version__, "no part of a model": everywhere, "families": families}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=Path, default=HERE / "golden" / "config_variants.json")
    parser.add_argument("--fields", type=Path, default=HERE.parents[1] / "model" / "huggingface" / "known_fields.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    args.fields.write_text(json.dumps(known_fields(), indent=1) + "\n")
    golden = {model_type: golden_variants(model_type, list(defaults_of(model_type))) for model_type in BASES}
    lines = (f"{json.dumps(model_type)}: {json.dumps(found)}" for model_type, found in golden.items())
    args.variants.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
