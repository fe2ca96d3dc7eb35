"""A config.json means here what it means in transformers, however it spells it, or it is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig, RopeScaling
from isthmus.model.rotary import frequencies
from isthmus.model.weights.huggingface import known
from isthmus.model.weights.huggingface.families import FAMILIES, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from tests.parity.config_variants import BASES, changed, variants
from tests.parity.families import GOLDEN

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
KNOWN = Path(known.__file__).with_name("known_fields.json")
VARIANTS = Path(__file__).parent / "golden" / "config_variants.json"

TOKENS = 40
"""That transformers was run on: a longer window is none"""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
REFUSED = {
    **{f"{size} absent": "a model without its sizes is a mistake" for size in SIZES},
    "rope: dynamic": "frequencies that change with the length aren't computed here",
    "rope: half rotary": "passed over, or a crash, where a family turns whole heads",
    "rope: half rotary inside": "passed over",
    "rope: half rotary, two words": "passed over",
    "rope: local linear": "layers with a window are never scaled here",
    "rope: both, old default": "its factor is passed over",
    "experts of each token": "experts_per_token is passed over",
    "two experts of each token": "experts_per_token is passed over",
    "two activations": "one of them is passed over",
    "new activation": "passed over",
    "local experts": "passed over where there are no experts",
    "experts": "passed over where there are no experts",
    "two numbers of experts": "passed over where there are no experts",
    "old pattern": "passed over where the layers are said otherwise",
    "two patterns": "passed over",
    "pattern beside layers": "passed over",
    "window": "passed over",
    "window unused": "passed over",
    "window used": "passed over",
    "window used from the first": "passed over",
    "window unused, layers named": "passed over",
    "window null, layers named": "passed over",
    "window null, layers not named": "passed over",
    "rope_interleave null": "only neighbours are turned",
    "qk_nope_head_dim absent": "the file's qk_head_dim says otherwise than the default",
    "qk_rope_head_dim absent": "the file's qk_head_dim says otherwise than the default",
    "num_experts_per_tok absent": "the default is more than the groups of this tiny model hold",
}
"""What transformers takes and we don't, and why: mostly fields of other families that it passes over"""

FLAT = ("theta inside", "new without", "new llama3", "kind null", "old word null", "linear", "llama3", "yarn",
        "rotary null inside", "old linear, old word", "two kinds", "su", "default, original")  # fmt: skip
"""Gemma 3's two ropes lie one level deeper, and transformers passes over what doesn't: we refuse it"""

TAKEN = {
    ("phi3", "rope: longrope, su"): "what Phi 3 was first published with",
    ("gemma3_text", "rope: full null, old linear"): "null is an absent rope, as it is without rope_scaling",
    **{("mixtral", f"rope: yarn{rest}"): "a crash for want of head_dim, which has a default" for rest in (
        "", ", old", " without an original length", ", original length outside", ", two original lengths",
        ", factor null", ", all options null", ", no options", ", truncate null", ", truncate false", ", mscale",
        ", attention factor")},
    ("phi3", "pad_token_id absent"): "the default is past this tiny vocabulary",
    ("smollm3", "pad_token_id absent"): "the default is past this tiny vocabulary",
}  # fmt: skip
"""What only crashes in transformers, and has one meaning"""


@cache
def golden() -> dict[str, Any]:
    return json.loads(VARIANTS.read_text())


def read(model_type: str, change: dict[str, Any]) -> ModelConfig | None:
    base = json.loads((GOLDEN / BASES[model_type] / "config.json").read_text())
    try:
        return read_fields(Fields(changed(base, change), Path("config.json")))[1]
    except ConfigError:
        return None


@cache
def cases(model_type: str) -> dict[str, tuple[str | None, ModelConfig | None]]:
    """By name: the first change that transformers computes the same for, and what we read."""
    same_as = golden()[model_type]["same as"]
    base = json.loads((GOLDEN / BASES[model_type] / "config.json").read_text())
    nulls = {name.removesuffix(" null") for name in same_as if name.endswith(" null")}
    changes = variants(model_type, base, sorted(name for name in nulls if " " not in name))
    assert {*same_as} <= {*changes}
    return {name: (same, read(model_type, changes[name])) for name, same in same_as.items()}


def computed(config: ModelConfig) -> tuple[Any, ...]:
    """What tells networks apart: of a rope its numbers, to which several descriptions may lead."""
    numbers = [
        f"{number:.6g}"
        for length in ("short", "long")
        for number in frequencies(config.rope_theta, config.rotated, config.rope_scaling, length)
    ]
    network = config.canonical()
    windows = tuple(0 if window >= TOKENS else window for window in network.windows)
    plain = dataclasses.replace(network, rope_theta=0.0, rope_scaling=RopeScaling(), windows=windows)
    return plain, numbers, f"{config.rope_scaling.attention_factor:.6g}"


def may_be_refused(model_type: str, name: str) -> bool:
    flat = model_type == "gemma3_text" and name.startswith(tuple(f"rope: {start}" for start in FLAT))
    return name in REFUSED or flat


def is_setting(model_type: str, name: str) -> bool:
    """Of a field without effect on the logits, in which transformers checks the type."""
    field, _, kind = name.rpartition(" ")
    return kind == "null" and known.is_harmless(model_type, field, None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_refused(model_type: str) -> None:
    """A folder that transformers refuses has no meaning that we could guess; one that it takes should load, but where
    it passes over what the file asks for."""
    for name, (same, config) in cases(model_type).items():
        if same is None:
            taken = (model_type, name) in TAKEN or is_setting(model_type, name)
            shadowed = (model_type, name) in {("deepseek_v3", "head_dim null"), ("qwen3_moe", "num_experts null")}
            assert config is None or taken or shadowed, f"{name}: transformers refuses it"
        else:
            assert config is not None or may_be_refused(model_type, name), f"{name}: transformers takes it"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_the_same(model_type: str) -> None:
    """Two spellings are one network here exactly if they are one in transformers, which ran both: else a folder is
    silently another model, as with rope_theta beside a rope_parameters that has none."""
    found = cases(model_type)
    for name, (same, config) in found.items():
        first = found[same][1] if same is not None else None
        if config is not None and first is not None:
            assert computed(config) == computed(first), f"{name} is {same} in transformers"
    firsts = [name for name, (same, config) in found.items() if same == name and config is not None]
    for index, name in enumerate(firsts):
        for other in firsts[:index]:
            ours, theirs = found[name][1], found[other][1]
            assert ours and theirs and computed(ours) != computed(theirs), f"{name} isn't {other} in transformers"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ropes_turn_as_in_transformers(model_type: str) -> None:
    """The numbers themselves: frequencies, and what multiplies cosine and sine."""
    compared = 0
    for name, ropes in golden()[model_type]["ropes"].items():
        config = cases(model_type)[name][1]
        for kind, (wanted, factor) in ropes.items() if config else ():
            local = kind == "sliding_attention" and config.local_rope_theta > 0
            scaling = RopeScaling() if local else config.rope_scaling
            theta = config.local_rope_theta if local else config.rope_theta
            got = frequencies(theta, config.rotated, scaling, "short")
            np.testing.assert_allclose(got, wanted, rtol=2e-6, err_msg=name)
            assert scaling.attention_factor == pytest.approx(factor, rel=1e-6), name
            compared += 1
    assert compared >= 4


@pytest.mark.peers
@pytest.mark.long
def test_the_tables_are_what_transformers_says_now(tmp_path: Path) -> None:
    """A new transformers may have new fields, or take old ones otherwise."""
    if not PEERS.is_file():
        pytest.skip("no .venv-peers: `make peers` builds it")
    script = Path(__file__).with_name("make_config_golden.py")
    files = {"--variants": tmp_path / "variants.json", "--fields": tmp_path / "fields.json"}
    subprocess.run([PEERS, script, *(str(word) for pair in files.items() for word in pair)], check=True, timeout=900)
    assert json.loads(files["--fields"].read_text()) == json.loads(KNOWN.read_text())
    now, then = json.loads(files["--variants"].read_text()), golden()
    assert {family: found["same as"] for family, found in now.items()} == {
        family: found["same as"] for family, found in then.items()
    }
