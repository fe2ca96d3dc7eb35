"""Integers in the place of matrices: what they are, which become them, how they travel, and what they cost."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.checks.crowd import Arrival, play
from isthmus.commands.main import main
from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.execution import DEFAULT_EXECUTION
from isthmus.model.ops.quantized import Quantized, from_integers, quantize, shapes
from isthmus.model.sharding import MeshShape, build_mesh, use_mesh
from isthmus.model.transformer import Params, abstract_params, bind
from isthmus.model.weights.checkpoint import CheckpointError, Checkpoints, CheckpointSource
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.gptq import quantize_by_moments
from isthmus.model.weights.load import load_params
from isthmus.model.weights.quantization import (
    SCHEMES,
    check_rules,
    formats,
    matrices,
    parse_rule,
    quantize_params,
    spelt_out,
    weight_bytes,
)
from isthmus.serve.engine.build import open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.executor import Executor
from isthmus.serve.engine.messages import Request
from isthmus.serve.engine.programs import Served
from isthmus.serve.engine.sampling import Sampling
from isthmus.train.step import packed_attention
from tests.model.weights.huggingface.folders import write_folder
from tests.parity.families import load
from tests.parity.test_portable import PLATFORMS, export_flat
from tests.support import TINY, forward, random_params

GREEDY = Sampling(temperature=0)
CONFIG = dataclasses.replace(TINY, dim=64, mlp_dim=96, head_dim=16)
ENGINE = EngineConfig(
    max_sequences=4, page_size=8, block_size=16, prefill_tokens=16, draft_rows=0, steps_per_launch=1
).resolve(CONFIG)


def quantized(config: ModelConfig, params: Params, scheme: str) -> Params:
    """A copy with the matrices of a scheme as integers."""
    copy = dict(params)
    quantize_params(config, copy, SCHEMES[scheme])
    return copy


def load_checkpoint(folder: Path, config: ModelConfig, mesh: Mesh) -> Params:
    return load_params(CheckpointSource(folder, config, mesh), abstract_params(config, mesh))


@pytest.mark.parametrize("inputs", [1, 31, 64, 100, 344])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 256), (6, 64), (5, 32), (4, 32), (4, 128)])
def test_a_number_comes_back_within_half_a_step(bits: Any, group: int, inputs: int) -> None:
    """A wrong bit, group or scale is a model that talks nonsense; the bound is what the nearest integer allows."""
    matrix = np.random.default_rng(inputs).standard_normal((inputs, 21)).astype(np.float32)
    matrix[:, 3] = 0
    made = quantize(jnp.asarray(matrix), bits, group, rotated=False)
    got, integers = np.asarray(made.dequantize()), np.asarray(made.integers())
    steps = np.abs(np.repeat(np.asarray(made.scales, np.float32), group, axis=0)[:inputs])
    ends = (integers == integers.min()) | (integers == integers.max())  # what lies beyond a scale's range is cut
    assert (np.abs(got - matrix) <= steps / 2 * 1.0001)[~ends].all()
    assert np.abs(got - matrix).max() <= np.abs(matrix).max() * 2.0 ** (2 - bits)
    assert (got[:, 3] == 0).all() and (made.bits, made.inputs, made.outputs) == (bits, inputs, 21)
    assert -(2 ** (bits - 1)) <= integers.min() and integers.max() < 2 ** (bits - 1)
    np.testing.assert_array_equal(np.asarray(made.columns(jnp.asarray([[5, 0]])))[0], got.T[[5, 0]])


@pytest.mark.parametrize("bits", [8, 6, 5, 4])
def test_integers_are_kept_bit_by_bit(bits: Any) -> None:
    """Files of other programs hold integers; what is kept of them must be those."""
    rng = np.random.default_rng(bits)
    integers = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (100, 7)).astype(np.int8)
    scales = rng.uniform(-1, 1, (4, 7)).astype(np.float16)
    made = from_integers(jnp.asarray(integers), jnp.asarray(scales), bits, 32)
    np.testing.assert_array_equal(made.integers(), integers)
    assert (made.values.shape, made.scales.shape) == shapes(bits, 32, 100, 7, rotated=False)
    want = integers * np.repeat(scales.astype(np.float32), 32, axis=0)[:100]
    np.testing.assert_array_equal(made.dequantize(), want)
    assert made.values.nbytes == 128 * 7 * bits // 8


@pytest.mark.parametrize(("bits", "most"), [(8, 0.006), (6, 0.028), (5, 0.055), (4, 0.105)])
def test_turned_by_a_block_a_matrix_with_outliers_keeps_its_numbers(bits: Any, most: float) -> None:
    """A few large inputs would take the scale from their neighbours: turned, the error is what normal numbers have."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((512, 24)).astype(np.float32)
    matrix[rng.integers(0, 512, 8)] *= 30
    errors = {}
    for rotated in (True, False):
        got = np.asarray(quantize(jnp.asarray(matrix), bits, 64, rotated=rotated).dequantize())
        errors[rotated] = np.sqrt(((got - matrix) ** 2).mean())
    spread = np.sqrt((matrix.reshape(-1, 64, 24) ** 2).mean(axis=1).mean())
    assert errors[True] < most * spread and errors[True] < 0.8 * errors[False]


def test_errors_are_made_up_for_over_the_inputs_that_a_matrix_meets() -> None:
    """Correlated activations: what one input's rounding loses, the others can give back. Against a plain loop."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((400, 12)) @ rng.standard_normal((12, 96)) + 0.3 * rng.standard_normal((400, 96))).astype(
        np.float32
    )
    matrix = rng.standard_normal((96, 10)).astype(np.float32)
    made = quantize_by_moments(jnp.asarray(matrix), jnp.asarray(x.T @ x), 4, 32, rotated=False)
    lost = np.linalg.norm(x @ (np.asarray(made.dequantize()) - matrix))
    nearest = quantize(jnp.asarray(matrix), 4, 32, rotated=False)
    assert lost < 0.5 * np.linalg.norm(x @ (np.asarray(nearest.dequantize()) - matrix))
    np.testing.assert_array_equal(made.integers(), plain_gptq(matrix, x, np.asarray(made.scales, np.float64), 32))


def plain_gptq(matrix: np.ndarray, x: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """Each input's nearest integers in turn; the best correction of all later inputs, by solving for it anew."""
    moments = x.T.astype(np.float64) @ x
    moments += 0.01 * np.diagonal(moments).mean() * np.eye(len(moments))
    left, integers = matrix.astype(np.float64), np.zeros(matrix.shape, np.int8)
    for k in range(len(left)):
        scale = scales[k // group]
        integers[k] = np.clip(np.rint(left[k] / scale), -8, 7)
        lost = left[k] - integers[k] * scale
        later = slice(k + 1, None)
        if k + 1 < len(left):
            left[later] += np.outer(np.linalg.solve(moments[later, later], moments[later, k]), lost)
    return integers


def test_rules_choose_by_path_and_the_first_one_counts() -> None:
    """Somebody keeps the first layer whole, or everything but the MLPs: the rules must mean what they say."""
    chosen = formats(CONFIG, ("blocks/0/.*=none", ".*mlp.*=int4:32", "head=int8"))
    assert {"/".join(path.split("/")[:2]) for path in chosen} == {"blocks/1", "head"}
    assert all(each.bits == (8 if path == "head" else 4) for path, each in chosen.items())
    assert "blocks/1/attention/query/kernel" not in chosen
    everything = formats(CONFIG, SCHEMES["int4"])
    assert everything["embedding"].bits == 8 and everything["blocks/0/mlp/up/kernel"].group == 64
    assert everything["blocks/0/attention/value/kernel"].bits == 6


@pytest.mark.parametrize(("inputs", "group"), [(576, 64), (640, 64), (344, 32), (24, 32), (1000, 64)])
def test_a_group_fits_the_inputs_unless_a_rule_names_it(inputs: int, group: int) -> None:
    """Padding would be read like weights at every step: 344 inputs in groups of 64 are 12% more."""
    config = dataclasses.replace(CONFIG, dim=inputs, heads=2, kv_heads=1, head_dim=16)
    path = "blocks/0/mlp/up/kernel"
    assert formats(config, (".*=int8",))[path].group == group
    assert formats(config, (".*=int8:128",))[path] == (8, 128, True, "bfloat16", True)
    assert formats(config, (".*=int8:32:plain",))[path] == (8, 32, False, "bfloat16", True)


@pytest.mark.parametrize(
    "rules, said",
    [
        (("lm_haed=int8", ".*=int4"), "'lm_haed=int8' matches no parameter's path"),
        ((".*=int8", ".*mlp.*=int4"), "'.*mlp.*=int4' comes too late"),
        (("blocks/0/.*=int4", ".*=int8", ".*mlp/up.*=none"), "comes too late"),
    ],
)
def test_a_rule_of_ones_own_that_changes_nothing_is_an_error(rules: tuple[str, ...], said: str) -> None:
    """A typo would otherwise quantize the head to 4 bits, and say nothing."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_rules(CONFIG, rules)
    check_rules(CONFIG, ("blocks/0/.*=int4", "head=none", ".*=int8"))


@pytest.mark.parametrize("rules", [*SCHEMES.values(), ("head=none", ".*mlp.*=int4:32:half", "no/such=int8", ".*=int6")])
def test_a_folder_names_every_group(rules: tuple[str, ...]) -> None:
    """Else another default would make another network of it. 344 inputs would leave a group of 64 half empty: one rule,
    two groups."""
    config = dataclasses.replace(CONFIG, dim=192, mlp_dim=344, heads=3, kv_heads=1, head_dim=8)
    spelt = spelt_out(config, rules)
    assert formats(config, spelt) == {path: each._replace(fixed=True) for path, each in formats(config, rules).items()}
    named = [parse_rule(rule)[1] for rule in spelt if "no/such" not in rule]
    assert all(each is None or each.fixed for each in named)


@pytest.mark.parametrize(
    "rule",
    [
        "int8",
        "=int8",
        ".*=int7",
        ".*=int8:16",
        ".*=int4:48",
        ".*=int4:plain:32",
        ".*=none:32",
        "(=int8",
        "no=int4",
        "(.*)*X=int8",
    ],
)
def test_a_rule_that_means_nothing_is_an_error(rule: str) -> None:
    """It would otherwise serve another model than was asked for, quietly."""
    with pytest.raises(ConfigError, match="quantize"):
        formats(CONFIG, (rule,))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_memory_is_what_the_rules_say(scheme: str, mesh: Mesh) -> None:
    """The pages of the cache are counted from what the weights leave."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(CONFIG, mesh))
    made = quantized(CONFIG, params, scheme)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    assert abs(weight_bytes(CONFIG, "bfloat16", SCHEMES[scheme]) - held) < 0.15 * held
    assert weight_bytes(CONFIG, "bfloat16", ()) > 1.8 * weight_bytes(CONFIG, "bfloat16", SCHEMES["int8"])


@pytest.mark.parametrize(("family", "most"), [("deepseek_v3", 0.15), ("gemma3", 0.003), ("gpt_oss", 0.02)])
def test_families_stay_close_to_themselves(family: str, most: float, mesh: Mesh) -> None:
    """Latents, experts, tied and scaled embeddings: what can't be quantized is left alone, the rest stays near. The
    bounds are two to three times what these networks, tiny and of large random weights, came to."""
    _, config, params = load(family, mesh)
    made = quantized(config, params, "int8")
    assert any(isinstance(weight, Quantized) for weight in made.values())
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, min(96, config.context_length)))
    want, got = (jax.nn.log_softmax(forward(config, each, tokens), axis=-1) for each in (params, made))
    assert 0 < float((jnp.exp(want) * (want - got)).sum(axis=-1).mean()) < most


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "cache_dtype"), [("int8", "model"), ("int4", "int8")])
def test_the_engine_generates_with_integers(scheme: str, cache_dtype: Any, mesh: Mesh) -> None:
    """By the kernels and by the reference: the same text, but for the rounding of activations, so nearly all of it."""
    params = quantized(CONFIG, random_params(CONFIG, mesh), scheme)
    texts: dict[str, list[list[int]]] = {}
    for kernels in ("auto", "reference"):
        engine = dataclasses.replace(ENGINE, cache_dtype=cache_dtype)
        served = Served(CONFIG, engine, CONFIG.vocab_size).with_kernels(kernels, mesh)
        executor = Executor(served, params, mesh)
        executor.warm_up()
        arrivals = [Arrival(Request(f"{i}", [i, 7, 3 * i + 1], GREEDY, 24)) for i in range(6)]
        play(executor, arrivals)
        texts[kernels] = [arrival.completion for arrival in arrivals]
        tokens = [arrival.tokens for arrival in arrivals]
        for text, logits in zip(texts[kernels], forward(CONFIG, params, tokens)[:, 2:-1], strict=True):
            lost = logits.max(axis=1) - logits[np.arange(len(text)), text]
            assert np.median(lost) < 0.05 and lost.max() < 0.6 * logits.std(), "not even near the likeliest"
    first = [a[0] == b[0] for a, b in zip(texts["auto"], texts["reference"], strict=True)]
    assert sum(first) >= 4


def test_a_batch_does_not_change_a_quantized_row(mesh: Mesh) -> None:
    """Activations are rounded by row: a neighbour with large numbers must not coarsen anybody else's."""
    params = quantized(CONFIG, random_params(CONFIG, mesh), "int4")
    executor = Executor(Served(CONFIG, ENGINE, CONFIG.vocab_size), params, mesh)
    executor.warm_up()
    alone = Arrival(Request("alone", [5, 6, 7], GREEDY, 20))
    play(executor, [alone])
    crowd = [Arrival(Request(f"{i}", [i, 5, 6, 7], GREEDY, 30)) for i in range(3)]
    again = Arrival(Request("again", [5, 6, 7], GREEDY, 20), step=2)
    play(executor, [*crowd, again])
    assert again.completion == alone.completion


def test_one_quantized_step_lowers_for_every_platform(mesh: Mesh) -> None:
    """A folder quantized on a laptop is served on a GPU or TPU: through the reference, from the same integers."""
    params = quantized(CONFIG, random_params(CONFIG, mesh), "int4")

    def step(params: Params, tokens: jax.Array) -> jax.Array:
        model = bind(CONFIG, DEFAULT_EXECUTION, params)
        hidden, _ = model(tokens, jnp.arange(8)[None], packed_attention(jnp.zeros((1, 8), jnp.int32)), None)
        return model.logits(hidden)

    tokens = jnp.arange(8)[None]
    exported = export_flat(jax.jit(step), (params, tokens), mesh)
    assert set(exported.platforms) == set(PLATFORMS)
    with use_mesh(mesh):
        (got,) = exported.call(*jax.tree.leaves((params, tokens)))
    np.testing.assert_allclose(got, forward(CONFIG, params, np.asarray(tokens)), rtol=1e-4, atol=1e-4)


def test_conversion_writes_what_serving_reads_on_any_mesh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: a published folder, the command, the gate's figures, the folder, an engine's parameters."""
    source = write_folder(tmp_path / "source", "llama3", shards=2)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    flags = ["--quantize", "int8", "--text", str(text), "--force"]
    assert main(["convert", str(source), str(tmp_path / "small"), *flags]) == 0
    assert "KL" in capsys.readouterr().out
    folder = open_folder(tmp_path / "small")
    assert folder.config.quantization == (".*=int8:32",)
    original = open_folder(source)
    want = original.load_params(build_mesh(MeshShape()))
    quantize_params(original.config, want, SCHEMES["int8"])
    for shape in (MeshShape(), MeshShape(tp=2)):
        got = load_checkpoint(folder.path, folder.config, build_mesh(shape))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ConfigError, match="quantized already"):
        open_model(tmp_path / "small", quantize="int8")
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "back")]) == 2
    assert "quantized" in capsys.readouterr().out
    for edited in (
        (".*=int8:32:plain",),
        (".*=int8:64",),
        (),
    ):  # the first takes as many bytes, which mean other numbers
        config = dataclasses.replace(folder.config, quantization=edited)
        with pytest.raises(CheckpointError, match=r"made by, which is \.\*=int8:32; put it back"):
            load_checkpoint(folder.path, config, build_mesh(MeshShape()))


def test_integers_of_an_earlier_version_are_refused(tmp_path: Path, mesh: Mesh) -> None:
    """They were kept in other bytes: read as ours they would be a model that talks nonsense."""
    config = dataclasses.replace(CONFIG, quantization=(".*mlp/up/.*=int8:64",))
    params = random_params(CONFIG, mesh)
    quantize_params(config, params, config.quantization)
    for path in matrices(config):
        if isinstance(params[path], Quantized):
            weight = params.pop(path)
            params[f"{path}/integers"] = weight.integers()
            params[f"{path}/scales"] = weight.scales[:1].astype(jnp.float32)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, params, None, {"step": 0, "tokens": 0})
    checkpoints.close()
    with pytest.raises(CheckpointError, match="made by, which is not known"):
        load_checkpoint(tmp_path, config, mesh)


def test_a_model_that_loses_too_much_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A silent conversion to nonsense would be found by its users; --force is for those who know."""
    source = write_folder(tmp_path / "source", "llama3")
    config = json.loads((source / "config.json").read_text())
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    flags = ["convert", str(source), str(tmp_path / "small"), "--quantize", ".*=int4:128", "--text", str(text)]
    flags += ["--no-suggest", "--calibration", "0"]
    assert config["model_type"] == "llama"
    assert main(flags) == 2
    assert "--force" in capsys.readouterr().out
    assert not list(tmp_path.glob("small*"))
    assert main([*flags, "--force"]) == 0
