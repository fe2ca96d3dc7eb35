"""Which fields of a config.json are passed over, warned of or refused; and that none, whatever it holds, ends in
anything but a model or an error that names it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.commands.convert import main as convert
from isthmus.errors import ConfigError
from isthmus.model.config import MAX_LAYERS, ModelConfig
from isthmus.model.rotary import frequencies
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.hub import FolderOptions
from isthmus.model.weights.huggingface import known
from isthmus.model.weights.huggingface.adapter_config import AdapterSettings
from isthmus.model.weights.huggingface.families import FAMILIES, read_fields
from isthmus.model.weights.huggingface.fields import Fields
from tests.model.weights.huggingface.folders import write_folder
from tests.parity.config_variants import BASES
from tests.parity.families import GOLDEN


def base(model_type: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / BASES[model_type] / "config.json").read_text())
    return config


def read(model_type: str, ignore: tuple[str, ...] = (), /, **changes: Any) -> tuple[ModelConfig, list[str]]:
    fields = Fields({**base(model_type), **changes}, Path("config.json"), ignore)
    return read_fields(fields)[1], fields.warnings


HARMLESS = {
    "_attn_implementation": "sdpa",
    "_commit_hash": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    "_model_name_or_path": "HuggingFaceTB/SmolLM2-135M",
    "_name_or_path": "./checkpoint-500",
    "architectures": None,
    "attention_dropout": 0.1,
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "bad_words_ids": [[5]],
    "bos_token": "<s>",
    "cache_implementation": "hybrid",
    "do_sample": True,
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "id2label": {"0": "LABEL_0"},
    "image_token_index": 262144,
    "initializer_range": 0.5,
    "is_llama_config": True,
    "learning_rate": 1e-4,
    "model_max_length": 8192,
    "model_name": "mine",
    "num_beams": 4,
    "output_attentions": True,
    "padding_side": "left",
    "pretraining_tp": 2,
    "router_aux_loss_coef": 0.9,
    "torch_dtype": "float16",
    "transformers.js_config": {"dtype": {"model": "q4"}},
    "transformers_version": "4.40.1",
    "unk_token_id": 0,
    "unsloth_fixed": True,
    "unsloth_version": "2024.9",
    "use_cache": False,
}
"""Of real folders, or written by the libraries that people use"""


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_changes_no_logit_is_passed_over(model_type: str) -> None:
    """Real folders hold what other programs wrote into them; shutting them out for it helps nobody."""
    plain, _ = read(model_type)
    config, warnings = read(model_type, **HARMLESS)
    assert (config, warnings) == (plain, [])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_changes_logits_is_read(model_type: str) -> None:
    """Every field of which transformers' own class makes another model decides something here too: one that holds
    nonsense is an error, and not passed over."""
    assert known.changing(model_type)
    # Where some fields have an effect at all:
    setting: dict[str, Any] = {
        "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        "qwen3_moe": {"use_sliding_window": True},
    }.get(model_type, {})
    for name in known.changing(model_type):
        with pytest.raises(ConfigError, match=name):
            read(model_type, ("num_local_experts",) * (name == "num_experts"), **{**setting, name: "nonsense"})


OFF: tuple[Any, ...] = (None, False, 0, 0.0, 1, 1.0, "", [], {})
ON: tuple[Any, ...] = (True, 2, -1, 0.5, "x", [0], {"a": 0})


@pytest.mark.parametrize("value", OFF, ids=repr)
def test_a_field_that_says_it_is_off_is_warned_of(value: Any) -> None:
    """Forks write down what they don't use, too; what they do use would be another model."""
    plain, _ = read("llama")
    config, warnings = read("llama", attention_magic=value)
    assert config == plain
    assert warnings == (
        [] if value is None else [f"config.json: attention_magic={value!r} is unknown, and has no effect"]
    )


@pytest.mark.parametrize("value", ON, ids=repr)
def test_a_field_that_asks_for_something_unknown_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"attention_magic=.* is not supported.*--ignore-field attention_magic"):
        read("llama", attention_magic=value)
    assert read("llama", ("attention_magic",), attention_magic=value) == read("llama")


def test_a_field_of_another_family_is_off_at_nothing_alone() -> None:
    """num_experts=1 in a dense family may be a model with an expert."""
    for name in ("sliding_window", "num_experts", "query_pre_attn_scalar"):
        assert read("llama", **{name: 0})[0] == read("llama")[0]
        with pytest.raises(ConfigError, match=f"{name}=1 is not supported"):
            read("llama", **{name: 1})
    for name in ("use_qk_norm", "use_sliding_window", "mlp_only_layers", "use_mrope"):
        value: Any = [] if name.endswith("layers") else False
        assert read("llama", **{name: value})[0] == read("llama")[0]


def test_a_field_of_the_ropes_can_be_ignored_too() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ConfigError, match=r"--ignore-field rope_parameters\.twist"):
        read("llama", rope_parameters={**rope, "twist": 5})
    ignored = read("llama", ("rope_parameters.twist",), rope_parameters={**rope, "twist": 5})
    assert ignored == read("llama", rope_parameters=rope)


@pytest.mark.parametrize(
    ("model_type", "name", "right", "wrong"),
    [
        ("llama", "num_key_value_groups", 1, 2),
        ("qwen3", "num_key_value_groups", 2, 3),
        ("llama", "layer_types", ["full_attention"] * 5, ["sliding_attention"] * 5),
        ("llama", "layer_types", None, ["full_attention"]),
        ("mistral", "layer_types", ["sliding_attention"] * 5, ["full_attention"] * 5),
        ("deepseek_v3", "qk_head_dim", None, 3),
        ("gpt_oss", "experts_per_token", None, 1),
    ],
)
def test_what_is_said_twice_must_agree(model_type: str, name: str, right: Any, wrong: Any) -> None:
    config = read(model_type)[0]
    if name == "num_key_value_groups":
        right, wrong = config.heads // config.kv_heads, config.heads
        wrong += 1
    elif name == "layer_types" and right is not None:
        right, wrong = right[:1] * config.layers, wrong[:1] * config.layers
    assert read(model_type, **{name: right})[0] == config
    with pytest.raises(ConfigError, match=name):
        read(model_type, **{name: wrong})


def test_warnings_and_ignored_fields_reach_the_folder(tmp_path: Path) -> None:
    """Commands print the one, and read the configuration again with the other."""
    write_folder(tmp_path, "llama3", attention_magic=3, use_qk_norm=False)
    with pytest.raises(ConfigError, match="attention_magic=3 is not supported"):
        open_folder(tmp_path)
    folder = open_folder(tmp_path, FolderOptions(ignore_field=("attention_magic",)))
    assert folder.ignore_field == ("attention_magic",)
    assert folder.warnings == (f"{tmp_path / 'config.json'}: use_qk_norm=False is unknown, and has no effect",)


def test_a_command_says_once_what_was_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "model", "llama3", attention_magic=3, use_qk_norm=False)
    words = [str(folder), str(tmp_path / "out")]
    assert convert(words) == 2
    assert "attention_magic=3 is not supported" in capsys.readouterr().out
    assert convert([*words, "--ignore-field", "attention_magic"]) == 0
    assert capsys.readouterr().out.count("use_qk_norm=False is unknown, and has no effect") == 1


# How long a sequence may be


@pytest.mark.parametrize(
    ("published", "scaling", "wanted"),
    [
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"type": "yarn", "factor": 4.0}, 131072),
        (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        (131072, {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}, 131072),
        (131072, {"rope_type": "linear", "factor": 8.0}, 131072),
        (32768, {"type": "yarn", "factor": 1e300}, (1 << 31) - 1),
        (32768, None, 32768),
    ],
)
def test_yarn_reaches_as_far_as_it_stretches(published: int, scaling: dict[str, Any] | None, wanted: int) -> None:
    """Qwen's makers have one add rope_scaling alone, and say that 131,072 tokens can be read then. Without an original
    length it is max_position_embeddings, as in transformers."""
    changes = {"max_position_embeddings": published, "rope_parameters": None, "rope_scaling": scaling}
    assert read("qwen3", **changes)[0].context_length == wanted


# Sizes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 2000, "num_hidden_layers=2000, and the files hold 5 layers"),
        ("num_hidden_layers", MAX_LAYERS + 1, "num_hidden_layers=.*at most 4096"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=.*at most 4096"),
        ("hidden_size", 2 * 10**9, r"embed_tokens\.weight is \[96, 40\], and config\.json makes it \[96, 2000000000\]"),
        ("vocab_size", 2 * 10**9, r"embed_tokens\.weight is \[96, 40\]"),
        ("intermediate_size", 2 * 10**9, "one of its sizes is too large"),
        ("head_dim", 2 * 10**9, "one of its sizes is too large"),
        ("hidden_size", 10**12, "must be a whole number"),
    ],
)
def test_sizes_beyond_the_files_are_refused_before_they_are_built(
    name: str, value: int, message: str, tmp_path: Path
) -> None:
    """Two thousand layers took minutes to build, and a thousand million all memory, before the files were looked at."""
    write_folder(tmp_path, "llama3", **{name: value})
    with pytest.raises(ConfigError, match=message):
        open_folder(tmp_path)


def test_our_own_configuration_has_the_same_limit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"layers": 10**9}))
    with pytest.raises(ConfigError, match="layers must be at most 4096"):
        open_folder(tmp_path)


# Whatever a field holds

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.sampled_from([0, 1, 2, 64, 10**400, -1, 1e308, 1e-308, 5e-324, float("inf"), float("nan"), 0.5]),
    st.text(max_size=8),
    st.sampled_from(["silu", "yarn", "linear", "llama3", "longrope", "default", "full_attention", "x" * 5000]),
)
ROPE_NAMES = st.sampled_from(
    [
        "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
        "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor",
        "short_factor", "long_factor", "partial_rotary_factor", "full_attention", "sliding_attention",
    ]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(ROPE_NAMES, inner, max_size=6)),
    max_leaves=8,
)
OTHERS = ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "num_experts", "layer_types",
          "original_max_position_embeddings", "num_key_value_groups", "quantization_config", "something")  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
@given(data=st.data())
def test_no_value_of_a_field_is_a_traceback(model_type: str, data: st.DataObject) -> None:
    """A folder is a stranger's; whatever its config.json holds gives an error with a sentence, or a model."""
    names = st.sampled_from(sorted({*base(model_type), *known.changing(model_type), *OTHERS}))
    changes = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    try:
        config, warnings = read(model_type, **changes)
    except ConfigError as error:
        assert len(str(error)) < 3000
        str(error).encode()
        return
    assert config.parameters > 0 and all(text.encode() for text in warnings)
    for length in ("short", "long") if config.rotated < 1 << 16 else ():
        frequencies(config.rope_theta, config.rotated, config.rope_scaling, length)


OWN = json.loads(json.dumps(dataclasses.asdict(ModelConfig())))


@given(st.dictionaries(st.sampled_from(sorted(OWN)), VALUES, min_size=1, max_size=3), st.data())
def test_no_value_of_our_own_configuration_is_a_traceback(changes: dict[str, Any], data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(["rope_scaling", "mixture", "latent", "lora"]))
    inner = data.draw(st.dictionaries(st.sampled_from(sorted(OWN[part])), VALUES, max_size=2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**OWN, part: {**OWN[part], **inner}, **changes}))
        try:
            config = ModelConfig.load(path)
        except ConfigError as error:
            str(error).encode()
            return
    assert config.parameters >= 0
    if config.rotated < 1 << 16:
        frequencies(config.rope_theta, config.rotated, config.rope_scaling, "short")


SETTINGS = {
    "generation_config.json": ("eos_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p", "num_beams"),
    "tokenizer_config.json": ("eos_token", "bos_token", "chat_template", "added_tokens_decoder", "pad_token"),
    "adapter_config.json": (
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
        "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "use_dora", "task_type",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def settings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("settings"), "llama3")


@pytest.mark.parametrize("name", SETTINGS)
@given(data=st.data())
def test_no_value_of_other_settings_is_a_traceback(name: str, settings_folder: Path, data: st.DataObject) -> None:
    values = data.draw(st.dictionaries(st.sampled_from(SETTINGS[name]), VALUES, min_size=1))
    file = settings_folder / name
    file.write_text(json.dumps(values))
    try:
        if name == "adapter_config.json":
            AdapterSettings.load(file).key_of("model.layers.0.self_attn.q_proj", 0)
        else:
            _ = open_folder(settings_folder).end_id
    except ConfigError as error:
        str(error).encode()
    finally:
        file.unlink()
