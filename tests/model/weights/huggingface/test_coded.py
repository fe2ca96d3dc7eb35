"""Folders whose matrices are kept as codes and scales are read as what these stand for, to the bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.sharding import MeshShape, build_mesh
from isthmus.model.weights.folder import PUBLISHED_CONFIG, open_folder
from isthmus.quality.convert import ConvertConfig, convert
from tests.model.weights.huggingface.coded_folders import (
    Kind,
    Tensors,
    awq,
    compressed,
    fp8,
    gptq,
    is_linear,
    stored,
    write_coded,
    write_mxfp4,
    write_plain,
)
from tests.model.weights.huggingface.folders import loaded, write_folder, write_tensors

KINDS: dict[str, Kind] = {
    "gptq": gptq(4, 32, symmetric=True),
    "gptq asymmetric": gptq(4, 16),
    "gptq v2": gptq(4, 32, v2=True),
    "gptq in another order": gptq(4, 32, order=True, v2=True),
    "gptq, one group": gptq(4, -1, v2=True),
    "gptq 8 bits": gptq(8, 32, symmetric=True),
    "gptq 8 bits v2": gptq(8, 32, v2=True),
    "gptq, other bits for some": gptq(4, 32, v2=True, dynamic={"-:.*lm_head": {}}),
    "awq": awq(32),
    "awq, a group that divides": awq(8),
    "fp8 tiles": fp8((16, 24)),
    "fp8 a matrix": fp8(None),
    "fp8 a matrix, vLLM's name": fp8(None, name="weight_scale"),
    "fp8 a row": fp8((1, 0)),
    "fp8 exponents": fp8((16, 16), exponents=True),
    "int4 groups": compressed(4, "group", group=32),
    "int4 groups, zeros": compressed(4, "group", group=8, symmetric=False),
    "int4 groups in another order": compressed(4, "group", group=32, symmetric=False, order=True),
    "int4 channels": compressed(4, "channel"),
    "int4 channels, zeros": compressed(4, "channel", symmetric=False),
    "int8 packed": compressed(8, "group", group=32),
    "int8 packed, zeros": compressed(8, "channel", symmetric=False),
    "int3 packed": compressed(3, "group", group=32),
    "int6 packed": compressed(6, "group", group=16, symmetric=False),
    "int8 channels": compressed(8, "channel", packed=False),
    "int8 a matrix": compressed(8, "tensor", packed=False),
    "int8 groups, zeros": compressed(8, "group", group=32, packed=False, symmetric=False),
    "int4 in bytes": compressed(4, "group", group=32, packed=False),
    "int4 in bytes, zeros": compressed(4, "group", group=32, packed=False, symmetric=False),
    "int6 in bytes": compressed(6, "channel", packed=False),
    "float a matrix": compressed(8, "tensor", packed=False, kind="float"),
    "float channels": compressed(8, "channel", packed=False, kind="float"),
    "float blocks": compressed(8, "block", packed=False, kind="float", block=(16, 24)),
    "naive": compressed(8, "channel", packed=False, kind="float", fmt="naive-quantized"),
}


def check(folder: Path, plain: Tensors, mesh: Mesh, dtype: str | None = None, *, stacked: bool = False) -> None:
    """The folder's parameters are, to the bit, those of a plain one of what it stands for."""
    other = folder.with_name("plain")
    if not other.exists():
        write_plain(other, folder, plain)
    got, wanted = loaded(folder, mesh, dtype, stacked=stacked), loaded(other, mesh, dtype, stacked=stacked)
    assert got.keys() == wanted.keys()
    for path, ours in got.items():
        assert ours.dtype == wanted[path].dtype and ours.sharding == wanted[path].sharding, path
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted[path]), err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_read_as_what_they_stand_for(kind: str, mesh: Mesh, tmp_path: Path) -> None:
    """Widths are 40, 48 and 56: no multiple of the groups and tiles, the last of which is cut."""
    check(*write_coded(tmp_path / "model", "llama3", KINDS[kind]), mesh)


@pytest.mark.parametrize("kind", ["gptq v2", "fp8 tiles", "int4 groups, zeros"])
def test_codes_are_rounded_once(kind: str, mesh: Mesh, tmp_path: Path) -> None:
    """To bfloat16 from float32, as plain tensors of float32 are."""
    check(*write_coded(tmp_path / "model", "llama3", KINDS[kind]), mesh, "bfloat16")


WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
"""Words of 2 and 3 bits hold 16 and 32 numbers"""

FAMILIES: dict[str, tuple[str, Kind, dict[str, Any]]] = {
    "gptq 2 bits": ("llama3", gptq(2, 32), WIDE),
    "gptq 3 bits": ("llama3", gptq(3, 32, v2=True), WIDE),
    "gptq 3 bits, zeros less one": ("llama3", gptq(3, 32, symmetric=True), WIDE),
    "rows of one matrix": ("phi3", gptq(4, 16, v2=True), {}),
    "rows of one matrix, fp8": ("phi3", fp8((16, 24)), {}),
    "a matrix an expert": ("mixtral", compressed(4, "group", group=8, symmetric=False), {"intermediate_size": 32}),
    "latent attention": ("deepseek_v3", fp8((16, 24)), {}),
    "biases": ("qwen2", awq(8), {"hidden_size": 64}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_familys_own_layout_goes_with_codes(case: str, mesh: Mesh, tmp_path: Path) -> None:
    """Fused, stacked, split and reordered matrices are views of the tensor that the codes stand for."""
    family, kind, fields = FAMILIES[case]
    check(*write_coded(tmp_path / "model", family, kind, **fields), mesh)


def test_gpt_oss_is_read_as_published(mesh: Mesh, tmp_path: Path) -> None:
    for dtype in (None, "bfloat16"):
        check(*write_mxfp4(tmp_path / "model"), mesh, dtype)


@pytest.mark.parametrize("kind", ["gptq v2", "awq", "fp8 tiles", "int4 groups, zeros"])
def test_codes_are_split_over_devices(kind: str, tmp_path: Path) -> None:
    """Each device gets its own part, in either layout; blocks, words and groups don't end where the parts do."""
    two = build_mesh(MeshShape(tp=2))
    folder, plain = write_coded(tmp_path / "model", "llama3", KINDS[kind])
    check(folder, plain, two)
    check(folder, plain, two, "bfloat16")
    check(folder, plain, build_mesh(MeshShape(fsdp=2, tp=2)), stacked=True)


def test_experts_of_codes_are_split_over_devices(tmp_path: Path) -> None:
    check(*write_mxfp4(tmp_path / "model"), build_mesh(MeshShape(ep=2, tp=2)))


Change = Callable[[Tensors], Any]
MODULE = "model.layers.1.mlp.down_proj"


def without(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{MODULE}.{part}")


def put(part: str, make: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{part}"] = make(tensors[f"{MODULE}.{part}"])

    return change


def one_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[-1] = np.nan
    return array


def add(part: str, array: np.ndarray) -> Change:
    return lambda tensors: tensors.update({f"{MODULE}.{part}": array})


BROKEN: dict[str, tuple[str, Change, str]] = {
    "gptq without scales": ("gptq", without("scales"), r"down_proj\.scales is missing, .*down_proj\.qweight"),
    "gptq without zeros": ("gptq", without("qzeros"), r"down_proj\.qzeros is missing"),
    "gptq without numbers": ("gptq", without("qweight"), r"down_proj\.(g_idx|qzeros) is stored as int32"),
    "gptq with a group less": ("gptq", put("scales", lambda x: x[:-1]), r"down_proj\.qzeros has the shape \[2, 5\]"),
    "gptq of another size": ("gptq", put("qweight", lambda x: x[:-1]), r"down_proj\.qweight has the shape \[6, 40\]"),
    "gptq of floats": ("gptq", put("qweight", lambda x: x.astype(np.float32)), r"qweight is stored as float32, not as"),
    "gptq with a scale that is none": ("gptq", put("scales", one_nan), r"down_proj\.scales holds scales .*not finite"),
    "gptq with a group that isn't there": ("gptq", put("g_idx", lambda x: x + 1), r"g_idx names groups .*there are 2"),
    "gptq with a bias": ("gptq", add("bias", np.ones(40, np.float32)), r"down_proj\.bias is no part of this"),
    "gptq and plain": (
        "gptq",
        add("weight", np.ones((40, 56), np.float32)),
        r"weight is there although .*qweight takes its place",
    ),
    "awq of another size": ("awq", put("qweight", lambda x: x[:-1]), r"down_proj\.weight has the shape \[40, 55\]"),
    "awq in more groups": ("awq", put("scales", lambda x: np.tile(x, (2, 1))), r"qzeros has the shape \[2, 5\]"),
    "fp8 without scales": ("fp8 tiles", without("weight_scale_inv"), r"weight_scale_inv is missing"),
    "fp8 in other tiles": ("fp8 tiles", put("weight_scale_inv", lambda x: x[:-1]), r"scale_inv has the shape \[2, 3\]"),
    "fp8 with a number that is none": (
        "fp8 tiles",
        put("weight", one_nan),
        r"down_proj\.weight holds numbers .*finite",
    ),
    "fp8 with a scale that is none": ("fp8 tiles", put("weight_scale_inv", one_nan), r"scale_inv holds .*not finite"),
    "fp8 with an exponent that is none": ("fp8 exponents", put("weight_scale_inv", one_nan), r"holds .*not finite"),
    "int4 without scales": ("int4 groups", without("weight_scale"), r"down_proj\.weight_scale is missing"),
    "int4 without its shape": ("int4 groups", without("weight_shape"), r"down_proj\.weight_shape is missing"),
    "int4 without zeros": ("int4 groups, zeros", without("weight_zero_point"), r"weight_zero_point is missing"),
    "int4 of another shape": (
        "int4 groups",
        put("weight_shape", lambda x: x + 8),
        r"weight_packed has the shape \[40, 7",
    ),
    "int4 with a group less": ("int4 groups", put("weight_scale", lambda x: x[:, 1:]), r"weight_scale has the shape"),
    "int8 of one axis": ("int8 channels", put("weight", lambda x: x.reshape(-1)), r"two axes are expected"),
    "fp8 tiles turned": (
        "fp8 tiles",
        put("weight_scale_inv", lambda x: x.reshape(-1)),
        r"scale_inv has the shape \[9\], and .* make it \[3, 3\]",
    ),
    "fp8 rows in two axes": (
        "fp8 a row",
        put("weight_scale_inv", lambda x: x.reshape(5, 8)),
        r"has the shape \[5, 8\]",
    ),
    "float blocks turned": (
        "float blocks",
        put("weight_scale", lambda x: x.reshape(1, 9)),
        r"weight_scale has the shape \[1, 9\], and .* make it \[3, 3\]",
    ),
    "channels in two axes": (
        "int8 channels",
        put("weight_scale", lambda x: x.reshape(5, 8)),
        r"weight_scale has the shape \[5, 8\]",
    ),
    "fp8 without rows": ("fp8 a matrix", put("weight", lambda x: x[:0]), r"weight has the shape \[0, 56\], .*empty"),
    "int8 without columns": ("int8 channels", put("weight", lambda x: x[:, :0]), r"the shape \[40, 0\], .*empty"),
    "int8 without rows": ("int8 a matrix", put("weight", lambda x: x[:0]), r"the shape \[0, 56\], .*empty"),
    "gptq without columns": ("gptq", put("qweight", lambda x: x[:, :0]), r"qweight has the shape \[7, 0\], .*empty"),
    "int4 of more": ("int4 in bytes", put("weight", lambda x: x | 8), r"down_proj\.weight holds .* -8\.\.7, .*damaged"),
    "int6 of less": ("int6 in bytes", put("weight", lambda x: x - 60), r"down_proj\.weight holds .* -32\.\.31"),
    "int4 zeros of more": (
        "int4 in bytes, zeros",
        put("weight_zero_point", lambda x: x * 0 + 9),
        r"weight_zero_point holds integers outside -8\.\.7",
    ),
    "int8 for floats": ("int8 channels", put("weight", lambda x: x.view(ml_dtypes.float8_e4m3fn)), "not as int8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_codes_that_dont_go_together_are_named(case: str, mesh: Mesh, tmp_path: Path) -> None:
    kind, change, message = BROKEN[case]
    folder, _ = write_coded(tmp_path / "model", "llama3", KINDS[kind])
    tensors = stored(folder)
    change(tensors)
    write_tensors(folder, tensors)
    with pytest.raises(ConfigError, match=message):
        loaded(open_folder(folder).path, mesh)


METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes' is not"),
    "no method": ({"bits": 4}, "quant_method=None is not supported here; only gptq, awq"),
    "a list": ({"quant_method": ["gptq"]}, r"quant_method=\['gptq'\] is not supported"),
    "5 bits": ({"quant_method": "gptq", "bits": 5}, "bits=5 is not supported here; only 2, 3, 4, 8"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not"),
    "is marlin": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format=True is not"),
    "no group": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0 must be"),
    "gemv": (
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "version='gemv' is not supported here; only 'gemm'",
    ),
    "awq without zeros": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point=False is not"),
    "one size": ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=.* two whole numbers"),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not supported"),
    "something": ({"quant_method": "mxfp4", "rotated": True}, "rotated=True is not supported.*--ignore-field"),
    "nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "format='nvfp4-pack-quantized'",
    ),
    "2:4": ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format='marlin-24' is not supported"),
    "sparse": (
        {**KINDS["int4 groups"].config, "sparsity_config": {"format": "sparse-24-bitmask"}},
        r"sparsity_config\.format='sparse-24-bitmask' is not supported",
    ),
    "turned": (
        {**KINDS["int4 groups"].config, "transform_config": {"config_groups": {"a": 1}}},
        "transform_config=.*is not",
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods_that_arent_known_are_named(case: str, tmp_path: Path) -> None:
    config, message = METHODS[case]
    with pytest.raises(ConfigError, match=rf"quantization_config\.{message}"):
        open_folder(write_folder(tmp_path, "llama3", quantization_config=config))


def test_biases_of_zeros_that_autogptq_writes_are_left_out(mesh: Mesh, tmp_path: Path) -> None:
    folder, plain = write_coded(tmp_path / "model", "llama3", KINDS["gptq"])
    write_tensors(folder, {**stored(folder), f"{MODULE}.bias": np.zeros(40, np.float16)})
    check(folder, plain, mesh)


@pytest.mark.parametrize("kind", ["fp8 a matrix", "float channels"])
def test_scales_of_activations_are_left_out(kind: str, mesh: Mesh, tmp_path: Path) -> None:
    """Activations stay what they are: the scales by which others round them change nothing."""
    folder, plain = write_coded(tmp_path / "model", "llama3", KINDS[kind])
    write_tensors(folder, {**stored(folder), f"{MODULE}.input_scale": np.ones(1, np.float32)})
    check(folder, plain, mesh)


def test_a_matrix_takes_the_scheme_that_names_it_best(mesh: Mesh, tmp_path: Path) -> None:
    """By its name before a pattern, by a pattern before its class."""
    folder, plain = write_coded(tmp_path / "model", "llama3", KINDS["int4 groups"])
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    wrong = {**group, "weights": {**group["weights"], "num_bits": 8}}
    groups = {"a": {**wrong, "targets": ["Linear"]}, "b": {**group, "targets": [r"re:.*layers\.\d+\..*"]}}
    config["quantization_config"]["config_groups"] = groups
    (folder / "config.json").write_text(json.dumps(config))
    check(folder, plain, mesh)
    groups["c"] = {**wrong, "targets": [MODULE]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"{MODULE}\.weight_packed has the shape"):
        open_folder(folder)
    config["quantization_config"]["config_groups"] = {"a": {**group, "targets": ["Conv2d"]}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is quantized, and no group in .*config_groups names it"):
        open_folder(folder)


@pytest.mark.parametrize("target", ["re:(.*)*(.*)*(.*)*X", "re:" + ".*" * 4 + "X", "re:("])
def test_a_pattern_that_could_take_for_ever_is_named(target: str, tmp_path: Path) -> None:
    folder, _ = write_coded(tmp_path / "model", "llama3", KINDS["int4 groups"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [target, "Linear"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"targets=.*{re.escape(target)}' (has|is) "):
        open_folder(folder)


def test_a_folder_of_codes_is_converted_to_plain_weights(mesh: Mesh, tmp_path: Path) -> None:
    """Into either layout, and what is written says nothing of codes any more."""
    folder, plain = write_coded(tmp_path / "model", "llama3", KINDS["gptq v2"])
    console = Console(file=StringIO())
    for to, dtype in (("isthmus", "source"), ("huggingface", "float32")):
        convert(ConvertConfig(folder, tmp_path / to, to=to, dtype=dtype), console)  # type: ignore[arg-type]
    assert "quantization_config" not in json.loads((tmp_path / "isthmus" / PUBLISHED_CONFIG).read_text())
    assert "quantization_config" not in json.loads((tmp_path / "huggingface" / "config.json").read_text())
    written = stored(tmp_path / "huggingface")
    assert written.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    convert(ConvertConfig(tmp_path / "isthmus", tmp_path / "back"), console)
    assert {array.dtype.name for name, array in stored(tmp_path / "back").items() if is_linear(name)} == {"float16"}
