"""Adapters in folders: what is saved is loaded, PEFT's own are computed as it does, and the rest is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from isthmus.checks.crowd import Arrival, play
from isthmus.errors import ConfigError
from isthmus.model.config import LoraConfig, ModelConfig
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.transformer import Params
from isthmus.model.weights.checkpoint import Checkpoints
from isthmus.model.weights.folder import ModelFolder, open_folder, read_adapter
from isthmus.model.weights.huggingface.adapter_config import AdapterSettings
from isthmus.model.weights.huggingface.adapters import ADAPTER_FILE, load_adapter, save_adapter
from isthmus.model.weights.huggingface.files import TensorFiles
from isthmus.model.weights.layout import unstack_params
from isthmus.model.weights.lora import split
from isthmus.model.weights.patterns import Matching
from isthmus.serve.engine.build import build_executor, open_model
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.sampling import Sampling
from tests.model.weights.test_lora import ENGINE, EVERYTHING, LORA, assert_same, some_tokens, zero_b
from tests.parity.weights import family_tensors
from tests.support import TINY, forward, merged, next_tokens, random_params, relative_error

GOLDEN = Path(__file__).resolve().parents[2] / "parity" / "golden"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a tiny tokenizer"], 258)


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Callable[[str], ModelFolder]:
    """Writes a tiny model of a family to tmp_path/FAMILY and opens it."""

    def make(family: str) -> ModelFolder:
        folder = tmp_path / family
        folder.mkdir()
        shutil.copyfile(GOLDEN / family / "config.json", folder / "config.json")
        save_file(family_tensors(GOLDEN / family), folder / "model.safetensors", {"format": "pt"})
        tokenizer.save(folder / "tokenizer.json")
        return open_folder(folder)

    return make


@pytest.fixture
def own(tmp_path: Path, tokenizer: Tokenizer, mesh: Mesh) -> ModelFolder:
    """A folder as training writes it."""
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    folder = tmp_path / "own"
    folder.mkdir()
    config.save(folder / "config.json")
    tokenizer.save(folder / "tokenizer.json")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, random_params(config, mesh), {"count": np.int32(1)}, {})
    checkpoints.close()
    return open_folder(folder)


def with_adapters(
    base: ModelFolder, mesh: Mesh, lora: LoraConfig = LORA, *, stacked: bool = False
) -> tuple[ModelConfig, Params]:
    """The base model's parameters with random adapters."""
    config = dataclasses.replace(base.config, lora=lora)
    _, adapters = split(config, random_params(config, mesh, stacked=stacked))
    return config, {**base.load_params(mesh, stacked=stacked), **adapters}


TARGETS = {
    "llama3": LORA.targets,
    "phi3": LORA.targets,
    "phi4": "attention/query|attention/value|mlp/up",
    "qwen3_moe": LORA.targets,
    "gemma3": LORA.targets,
    "mixtral": LORA.targets,
    "gpt_oss": "attention/.*",
    "deepseek_v2": EVERYTHING,
    "deepseek_v3": EVERYTHING,
}


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("family", TARGETS)
def test_what_is_saved_is_what_is_loaded(
    family: str, stacked: bool, published: Callable, mesh: Mesh, tmp_path: Path
) -> None:
    """Training goes on from a saved adapter, and a server starts from it: not a bit may be lost on the way."""
    base = published(family)
    config, params = with_adapters(base, mesh, dataclasses.replace(LORA, targets=TARGETS[family]), stacked=stacked)
    config.validate()
    save_adapter(tmp_path / "adapter", base, config, params)
    lora, adapters = load_adapter(tmp_path / "adapter", base)
    assert_same(adapters, unstack_params(split(config, params)[1]))
    assert (lora.rank, lora.alpha) == (LORA.rank, LORA.alpha)
    again = dataclasses.replace(config, lora=lora)
    assert [again.adapted(kind) for kind in config.layer_kinds] == [config.adapted(kind) for kind in config.layer_kinds]

    folder = open_folder(tmp_path / "adapter")
    assert (folder.name, folder.adapter, folder.path) == ("adapter", tmp_path / "adapter", base.path)
    assert folder.config == again
    assert_same(folder.load_params(mesh, stacked=stacked), params)


def test_a_fresh_adapter_survives_saving(published: Callable, mesh: Mesh, tmp_path: Path) -> None:
    """A run may be stopped before its first step."""
    base = published("phi3")
    config = dataclasses.replace(base.config, lora=dataclasses.replace(LORA, targets="attention/(query|value)"))
    adapters = split(config, zero_b(random_params(config, mesh)))[1]
    save_adapter(tmp_path / "adapter", base, config, adapters)
    assert_same(load_adapter(tmp_path / "adapter", base)[1], adapters)


def test_an_adapter_of_a_model_of_our_own(own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """A model that was trained here is adapted as a published one is."""
    config, params = with_adapters(own, mesh)
    save_adapter(tmp_path / "adapter", own, config, params)
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    folder = open_folder(tmp_path / "adapter")
    assert_same(folder.load_params(mesh), params)
    assert_same(folder.load_params(mesh, merge_adapter=True), merged(config, params)[1])
    assert folder.load_params(mesh, "bfloat16")["blocks/0/mlp/up/lora_a"].dtype == "bfloat16"
    assert folder.tokenizer.eos_ids == own.tokenizer.eos_ids


def test_modules_are_named_so_that_no_other_is_meant(published: Callable, mesh: Mesh, tmp_path: Path) -> None:
    """Beside experts, PEFT takes the bare name of an MLP's projection for theirs, and drops the adapter."""
    base = published("qwen3_moe")
    config = dataclasses.replace(base.config, lora=LORA)
    save_adapter(tmp_path / "adapter", base, config, random_params(config, mesh))
    stored = json.loads(config_text(tmp_path / "adapter"))
    assert stored["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert stored["target_parameters"] == [f"mlp.{part}_proj.weight" for part in ("down", "gate", "up")]


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("merge_adapter", [False, True])
def test_serving_an_adapter_folder(merge_adapter: bool, tp: int, own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """`isthmus serve --model ADAPTER`, with --merge-adapter and without, on one device and over two."""
    config, params = with_adapters(own, mesh)
    save_adapter(tmp_path / "adapter", own, config, params)
    model = open_model(tmp_path / "adapter", "float32", merge_adapter=merge_adapter)
    assert bool(model.config.lora.rank) != merge_adapter
    executor = build_executor(model, ENGINE, MeshShape(tp=tp))
    arrival = Arrival(Request("one", [5, 6, 7], Sampling(temperature=0), 20))
    play(executor, [arrival])
    row = next_tokens(config, params, [arrival.tokens], model.tokenizer.vocab_size)[0]
    assert arrival.completion == row[2 : len(arrival.tokens) - 1].tolist()


def test_the_base_is_found_beside_the_adapter(own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """A folder that holds both can be moved."""
    config, params = with_adapters(own, mesh)
    save_adapter(tmp_path / "adapter", own, config, params)
    assert Path(json.loads(config_text(tmp_path / "adapter"))["base_model_name_or_path"]).is_absolute()
    edit(tmp_path / "adapter", base_model_name_or_path="../own")
    assert_same(open_folder(tmp_path / "adapter").load_params(mesh), params)


def test_the_adapters_tokenizer_and_template_win(own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """Whoever trained an adapter on conversations stored the template that it was trained with."""
    config, params = with_adapters(own, mesh)
    adapter = tmp_path / "adapter"
    save_adapter(adapter, own, config, params)
    (own.path / "chat_template.jinja").write_text("base")
    assert open_folder(adapter).chat.render([{"role": "user", "content": "hi"}]) == "base"
    (adapter / "chat_template.jinja").write_text("{{ bos_token }}adapter")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json that names its special tokens"):
        open_folder(adapter)
    (adapter / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert open_folder(adapter).chat.render([{"role": "user", "content": "hi"}]) == "<s>adapter"
    Tokenizer.train(["other"], 257).save(adapter / "tokenizer.json")
    assert open_folder(adapter).tokenizer.vocab_size < own.tokenizer.vocab_size


# adapters made elsewhere


def config_text(adapter: Path) -> str:
    return (adapter / "adapter_config.json").read_text()


def edit(adapter: Path, **fields: Any) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({**json.loads(config_text(adapter)), **fields}))


def make_adapter(base: ModelFolder, adapter: Path, ranks: dict[str, int], **fields: Any) -> dict[str, np.ndarray]:
    """An adapter in PEFT's layout of the modules in `ranks`; gives back its tensors."""
    weights = family_tensors(GOLDEN / base.path.name)
    tensors = {}
    for module, rank in ranks.items():
        outputs, inputs = weights[f"{module}.weight"].shape
        rng = np.random.default_rng([*module.encode()])
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            noise = rng.standard_normal(shape) / math.sqrt(shape[1])
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = noise.astype(np.float32)
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "base_model_name_or_path": str(base.path),
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "task_type": "CAUSAL_LM",
        **fields,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


def merged_by_hand(base: ModelFolder, tensors: dict[str, np.ndarray], scale: Callable[[str], float]) -> Params:
    """The parameters of the published model with scale * B·A added to its tensors."""
    weights = family_tensors(GOLDEN / base.path.name)
    for name in [name for name in tensors if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + np.float32(scale(module)) * product
    save_file(weights, base.path / "model.safetensors", {"format": "pt"})
    return open_folder(base.path).load_params(build_mesh(MeshShape()))


LAYER = "model.layers.{}.{}"
MODULES: dict[str, list[str]] = {
    "llama3": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"],
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj"],
    "deepseek_v2": ["self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"],
    "deepseek_v3": ["self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.o_proj"],
}


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_from_elsewhere_adds_its_product(
    family: str, rslora: bool, published: Callable, tmp_path: Path
) -> None:
    """Rows in another order, or a scale that is taken for another, would give a model that is almost right."""
    base, adapter = published(family), tmp_path / "adapter"
    ranks = {LAYER.format(layer, name): 4 for layer in range(base.config.layers) for name in MODULES[family]}
    tensors = make_adapter(base, adapter, ranks, use_rslora=rslora, lora_alpha=3)
    _, adapters = load_adapter(adapter, base)
    mesh = build_mesh(MeshShape())
    config = dataclasses.replace(base.config, lora=open_folder(adapter).config.lora)
    computed = forward(config, {**base.load_params(mesh), **adapters}, some_tokens(config))
    want = merged_by_hand(base, tensors, lambda module: 3 / (2 if rslora else 4))
    assert relative_error(computed, forward(base.config, want, some_tokens(config))) <= 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_may_differ(rslora: bool, published: Callable, mesh: Mesh, tmp_path: Path) -> None:
    """rank_pattern and alpha_pattern give modules their own; the first pattern that matches a whole name counts."""
    base, adapter = published("phi3"), tmp_path / "adapter"
    ranks = {LAYER.format(0, "self_attn.qkv_proj"): 6, LAYER.format(1, "self_attn.qkv_proj"): 2}
    ranks |= {LAYER.format(3, "self_attn.o_proj"): 4, LAYER.format(1, "mlp.down_proj"): 12}
    patterns = {r"layers\.0\.self_attn\.qkv_proj": 6, "qkv_proj": 2, "^model.layers.1.mlp.down_proj": 12, "proj": 99}
    alphas = {r"(down|qkv)_proj": 3.5, "attn.o_proj": 99}
    tensors = make_adapter(base, adapter, ranks, rank_pattern=patterns, alpha_pattern=alphas, use_rslora=rslora)
    lora, adapters = load_adapter(adapter, base)
    assert lora.rank == 12
    config = dataclasses.replace(base.config, lora=lora)
    computed = forward(config, {**base.load_params(mesh), **adapters}, some_tokens(config))

    def scale(module: str) -> float:
        rank = ranks[module]
        return (16 if "o_proj" in module else 3.5) / (math.sqrt(rank) if rslora else rank)

    want = merged_by_hand(base, tensors, scale)
    assert relative_error(computed, forward(base.config, want, some_tokens(config))) <= 1e-5


def test_layers_without_an_adapter_are_the_bases(published: Callable, mesh: Mesh, tmp_path: Path) -> None:
    """layers_to_transform adapts some layers only, in the scanned layout too."""
    base, adapter = published("llama3"), tmp_path / "adapter"
    make_adapter(base, adapter, {LAYER.format(2, "self_attn.q_proj"): 4}, layers_to_transform=[2])
    folder = open_folder(adapter)
    _, adapters = split(folder.config, folder.load_params(mesh, stacked=True))
    (query,) = (weight for path, weight in adapters.items() if path.endswith("/attention/query/lora_b"))
    used = np.asarray(query).any(axis=(1, 2, 3))
    assert used.tolist() == [layer == 2 for layer in range(base.config.layers)]


def test_a_published_adapter_is_saved_as_small_as_it_was(published: Callable, mesh: Mesh, tmp_path: Path) -> None:
    """A fused module's one A is shared by its parts; saved once for each, it would grow with every training."""
    base = published("phi3")
    ranks = {LAYER.format(layer, "self_attn.qkv_proj"): 4 for layer in range(base.config.layers)}
    tensors = make_adapter(base, tmp_path / "one", ranks)
    folder = open_folder(tmp_path / "one")
    save_adapter(tmp_path / "two", base, folder.config, folder.load_params(mesh))
    again = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert_same(again, tensors)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"lora_bias": True}, "lora_bias=True is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*is not supported"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices=.*is not supported"),
    ({"layer_replication": [[0, 1]]}, "layer_replication=.*is not supported"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*is not supported"),
    ({"a_later_invention": 0.5}, "a_later_invention=0.5 is not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"r": 0}, "r=0"),
    ({"r": "4"}, "r='4'"),
    ({"lora_alpha": 0}, "lora_alpha=0 must be positive"),
    ({"lora_alpha": -2}, "lora_alpha=-2"),
    ({"use_rslora": "yes"}, "use_rslora='yes'"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=.*whole numbers"),
    ({"rank_pattern": [4]}, "rank_pattern=.*whole numbers"),
    ({"rank_pattern": {"q_proj": 8}}, r"q_proj\.lora_A\.weight has the shape \[4, 40\].*\[8, 40\]"),
    ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern=.*positive numbers"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern=.*positive numbers"),
    ({"lora_alpha": 5e-324}, "lora_alpha=5e-324 or alpha_pattern makes the scale 0.0"),
    ({"lora_alpha": 5e-324, "alpha_pattern": {"q_proj": 1}}, "lora_alpha=5e-324 or alpha_pattern"),
    ({"lora_alpha": 1e200}, r"lora_alpha=1e\+200 or alpha_pattern makes the scale"),
    ({"alpha_pattern": {"q_(proj": 1}}, "alpha_pattern=.*regular expression"),
    ({"target_modules": ["k_proj"]}, "target_modules=.*leaves out model.layers.0.self_attn.q_proj"),
    ({"target_modules": r".*\.k_proj"}, "target_modules=.*leaves out model.layers.0.self_attn.q_proj"),
    ({"target_modules": "("}, "target_modules=.*regular expression"),
    ({"rank_pattern": {"([a-z._0-9]+)+!": 4}}, "rank_pattern=.*over a group that itself matches"),
    ({"alpha_pattern": {"(.|[a-z])*!": 4}}, "alpha_pattern=.*over a group that itself matches"),
    ({"target_modules": "(.*a|.*b)*"}, "target_modules=.*over a group that itself matches"),
    ({"target_modules": ".?" * 39 + "!"}, "target_modules=.*too many ways"),
    ({"target_modules": "(.|[a-z])" * 39 + "!"}, "target_modules=.*too many ways"),
    ({"target_modules": "(){1000000}"}, "target_modules=.*over a group that itself matches"),
    ({"exclude_modules": ".*" * 7 + "!"}, "exclude_modules=.*7 quantifiers"),
    ({"rank_pattern": {f"a{index}": 4 for index in range(4097)}}, "rank_pattern=.*at most 4096 patterns"),
    ({"rank_pattern": {".*.*.*a": 4, ".*.*.*b": 4}}, "rank_pattern=.*in too many ways"),
    ({"alpha_pattern": {f".*.*[a{index}]": 4 for index in range(300)}}, "alpha_pattern=.*in too many ways"),
    ({"rank_pattern": {"(?<=.*)x": 4}}, "rank_pattern=.*look-behind"),
    ({"exclude_modules": "(?<=.*)x"}, "exclude_modules=.*look-behind"),
    ({"target_modules": "(q_proj){e<=1}"}, "target_modules=.*a brace that is no number of times"),
    ({"target_modules": "a" * 20_000}, "target_modules=.*longer than 16384 characters"),
    ({"target_modules": None}, "target_modules=None leaves out"),
    ({"target_modules": 3}, "target_modules=3 must be a list"),
    ({"target_modules": None, "target_parameters": ["k_proj.weight"]}, "target_modules=None leaves out"),
    ({"exclude_modules": ["q_proj"]}, "exclude_modules=.*leaves out"),
    ({"layers_to_transform": [1]}, "layers_to_transform=.*leaves out"),
    ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern='h'"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path=None must name"),
    ({"base_model_name_or_path": "meta/llama"}, "base_model_name_or_path='meta/llama' isn't here.*--base FOLDER"),
    ({"base_model_name_or_path": "."}, "adapter is an adapter itself"),
]


@pytest.mark.parametrize(("fields", "match"), BAD_FIELDS, ids=lambda value: next(iter(value)) if value else "")
def test_a_field_that_is_not_honoured_is_named(
    fields: dict[str, Any], match: str, published: Callable, tmp_path: Path
) -> None:
    """An adapter that computes something else than PEFT would is worse than none."""
    make_adapter(published("llama3"), tmp_path / "adapter", {LAYER.format(0, "self_attn.q_proj"): 4})
    open_folder(tmp_path / "adapter")
    edit(tmp_path / "adapter", **fields)
    with pytest.raises(ConfigError, match=match):
        open_folder(tmp_path / "adapter")


@pytest.mark.parametrize("keys", [[f"model.layers.{index}.q_proj" for index in range(4096)], [r".*\.\d+\..*q_proj"]])
def test_patterns_that_trainers_write_are_read(keys: list[str], tmp_path: Path) -> None:
    """Limits that are made against hostile folders must leave room for what a search over ranks writes."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern": dict.fromkeys(keys, 4)}))
    settings = AdapterSettings.load(path)
    assert settings.rank_of("base.model.layers.17.q_proj") == 4 and settings.rank_of("model.layers.17.k_proj") == 2


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_a_folder_whose_patterns_take_too_long_is_refused(name: str, tmp_path: Path) -> None:
    """It would hold a thread of the server for as long as it likes."""
    value = {"q_proj": 4} if name.endswith("pattern") else ".*q_proj"
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], name: value}))
    settings = dataclasses.replace(AdapterSettings.load(path), matching=Matching(0))
    with pytest.raises(ConfigError, match=f"{name}=.*takes too long"):
        settings.scale_of(settings.key_of("model.layers.0.self_attn.q_proj", 0))


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
BAD_TENSORS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "no B": (lambda t: {A: t[A]}, rf"the tensor {B} is missing"),
    "no A": (lambda t: {B: t[B]}, rf"the tensor {A} is missing"),
    "none": (lambda t: {}, "holds no tensor"),
    "shape of A": (lambda t: {**t, A: t[A][:, 1:].copy()}, rf"{A} has the shape \[4, 39\]"),
    "shape of B": (lambda t: {**t, B: t[B][1:].copy()}, rf"{B} has the shape \[47, 4\]"),
    "rank": (lambda t: {A: t[A][1:].copy(), B: t[B][:, 1:].copy()}, rf"{A} has the shape \[3, 40\]"),
    "axes": (lambda t: {**t, A: t[A][None]}, rf"{A} has the shape \[1, 4, 40\]"),
    "NaN": (lambda t: {**t, A: t[A] * np.float32(np.nan)}, rf"{A} holds numbers that are not finite"),
    "too large for bfloat16": (
        lambda t: {**t, A: t[A] * 0 + np.float32(3.4e38)},
        "the factors of blocks/0/.*query reach",
    ),
    "too large with the scale": (lambda t: {**t, B: t[B] * 0 + np.float32(3e38)}, "query reach .* with their scale"),
    "embedding": (
        lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": t[A]},
        "lora_embedding_A of an embedding or the head is no part",
    ),
    "head": (lambda t: {**t, "base_model.model.lm_head.weight": t[A]}, r"lm_head\.weight of an embedding or the head"),
    "magnitude": (lambda t: {**t, f"{Q}.lora_magnitude_vector": t[A][0]}, "lora_magnitude_vector is no part"),
    "bias": (lambda t: {**t, f"{Q}.lora_B.bias": t[A][0]}, r"lora_B\.bias is no part"),
    "layer": (
        lambda t: {**t, A.replace("layers.0", "layers.99"): t[A]},
        r"layers\.99.* is of layer 99, and the model has layers 0 to \d+: it is an adapter of another model",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_is_wrong_is_named(case: str, published: Callable, tmp_path: Path) -> None:
    """Half an adapter, or one of another model, must not be served as if it were whole."""
    change, match = BAD_TENSORS[case]
    tensors = make_adapter(published("llama3"), tmp_path / "adapter", {LAYER.format(0, "self_attn.q_proj"): 4})
    save_file(change(tensors), tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=match):
        open_folder(tmp_path / "adapter")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:vision|image|visual|patch|embed|tower|encoder|language|text|model).*?(?:self_attn|attention|attn|mlp|"
        r"feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\."
        r"[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|up_proj)))",
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attn|mlp|ffn).*?(?:q_proj|k_proj|v_proj|o_proj|up_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|up_proj)))",
        r"^(?!.*visual).*(?:q_proj|k_proj).*$",
        r"model\.layers\.(0|1|2|10)\.self_attn\.(q|v)_proj",
    ],
)
def test_patterns_as_trainers_write_them_are_taken(pattern: str, published: Callable, tmp_path: Path) -> None:
    """Whoever trained with one of the common tools must not have to edit what it wrote."""
    make_adapter(published("llama3"), tmp_path / "adapter", {LAYER.format(0, "self_attn.q_proj"): 4})
    edit(tmp_path / "adapter", target_modules=pattern, alpha_pattern={r"layers\.\d+\.self_attn\.(q|k)_proj": 3})
    assert open_folder(tmp_path / "adapter").config.lora.rank == 4


def test_a_tokenizer_of_any_size_may_lie_beside(own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """It isn't used, so it is compared without being held whole."""
    config, params = with_adapters(own, mesh)
    save_adapter(tmp_path / "adapter", own, config, params)
    with (tmp_path / "adapter" / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 41)
    _, warnings = read_adapter(tmp_path / "adapter", own)
    assert len(warnings) == 1 and "another tokenizer" in warnings[0]


def test_experts_and_latent_keys_of_an_adapter_are_refused(published: Callable, tmp_path: Path) -> None:
    """They can't be computed here, and leaving them out would be another model."""
    base = published("deepseek_v2")
    for index, name in enumerate(("self_attn.kv_b_proj", "mlp.experts.0.up_proj")):
        make_adapter(base, tmp_path / f"{index}", {LAYER.format(1, name): 4})
        with pytest.raises(ConfigError, match=rf"layers\.1\.{name}\.lora_A\.weight is no part of an adapter"):
            open_folder(tmp_path / f"{index}")


def test_damaged_folders_are_refused(own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """A copy that was cut short says so."""
    config, params = with_adapters(own, mesh)
    adapter = tmp_path / "adapter"
    save_adapter(adapter, own, config, params)
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        open_folder(adapter)
    file.unlink()
    with pytest.raises(ConfigError, match=r"adapter holds no adapter_model\.safetensors"):
        open_folder(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin, a pickle"):
        open_folder(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config\.json can't be read as JSON"):
        open_folder(adapter)


def test_nothing_is_read_of_an_adapter_that_finds_no_room(published: Callable, tmp_path: Path) -> None:
    """Its file may say that it has terabytes, which cost nothing on disk while they are zeros."""
    base = published("llama3")
    make_adapter(base, tmp_path / "adapter", {LAYER.format(0, "self_attn.q_proj"): 4})
    assert load_adapter(tmp_path / "adapter", base, 4).lora.rank == 4
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has rank 4; the most is 3"):
        load_adapter(tmp_path / "adapter", base, 3)
    edit(tmp_path / "adapter", r=1 << 30)
    with pytest.raises(ConfigError, match=r"q_proj has rank 1073741824; the most is 4"):
        load_adapter(tmp_path / "adapter", base, 4)


def test_a_file_that_is_cut_short_while_it_is_read(published: Callable, tmp_path: Path) -> None:
    """Whoever replaces an adapter's file while it is loaded must not end the server, as reading a mapping would."""
    make_adapter(published("llama3"), tmp_path / "adapter", {LAYER.format(0, "self_attn.q_proj"): 4})
    files = TensorFiles(tmp_path / "adapter", ADAPTER_FILE)
    assert (files.copy(A) == files.array(A)).all()
    (tmp_path / "adapter" / ADAPTER_FILE).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors was cut short"):
        files.copy(A)


def test_an_adapter_of_an_adapted_model_is_refused(own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """Two adapters on one kernel are not computed here."""
    config, params = with_adapters(own, mesh)
    save_adapter(tmp_path / "adapter", own, config, params)
    config.save(own.path / "config.json")
    with pytest.raises(ConfigError, match=r"own has adapters itself \(model\.lora"):
        open_folder(tmp_path / "adapter")


def test_another_adapter_than_was_opened_is_refused(own: ModelFolder, mesh: Mesh, tmp_path: Path) -> None:
    """Between opening and loading the folder may have been written anew."""
    config, params = with_adapters(own, mesh)
    save_adapter(tmp_path / "adapter", own, config, params)
    folder = open_folder(tmp_path / "adapter").with_config(lora=LoraConfig(7))
    with pytest.raises(ConfigError, match=r"holds an adapter of LoraConfig\(rank=3"):
        folder.load_params(mesh)
