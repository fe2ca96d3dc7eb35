"""Where a GGUF file may lie, what is taken from it beside the weights, and writing one."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from jax.sharding import Mesh
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.model.weights.folder import GenerationDefaults, open_folder
from isthmus.model.weights.gguf.header import read_header
from isthmus.quality.convert import ConvertConfig, convert
from tests.model.weights.gguf.made import finish, write_config, write_gguf, write_tokenizer
from tests.model.weights.gguf.test_families import wide_llama
from tests.parity.families import golden
from tests.parity.test_families import TOLERANCE, _logits, batch_of
from tests.support import relative_error


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small-1B.Q8.gguf", "llama2")


def test_a_file_may_be_named_or_the_folder_that_holds_it_alone(file: Path) -> None:
    for path in (file, file.parent):
        folder = open_folder(path)
        assert (folder.name, folder.source) == ("small-1B.Q8", file)


def test_tokens_that_end_and_the_template_come_with_it(file: Path) -> None:
    """Who asks for an answer would otherwise get one that never ends, or none in the form that the model learned."""
    folder = open_folder(file)
    assert folder.tokenizer.eos_ids == {0, 95} and folder.end_id == 0
    assert folder.chat is not None
    text = folder.chat.render([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert folder.tokenizer.encode_chat(text)[0] == 94 and folder.tokenizer.encode("a")[0] == 0
    assert folder.generation == GenerationDefaults()
    assert re.search(r"matrices: .*in F32 are read as floats", folder.remarks[-1])


def test_recommended_sampling_is_taken(tmp_path: Path) -> None:
    tensors, sizes = wide_llama()
    write_gguf(tmp_path / "plain.gguf", "llama2", tensors=tensors, **sizes)
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    header = read_header(tmp_path / "plain.gguf")
    config = {"max_position_embeddings": 96, "rms_norm_eps": 1e-5, "vocab_size": 96,
              "rope_parameters": {"rope_theta": 1e4}, **sizes}  # fmt: skip
    write_config(writer, config)
    write_tokenizer(writer)
    writer.add_float32("general.sampling.temp", 0.25)
    writer.add_int32("general.sampling.top_k", 20)
    for name, stored in header.tensors.items():
        count = int(np.prod(stored.shape))
        writer.add_tensor(name, np.frombuffer(stored.memory, np.float32, count, stored.start).reshape(stored.shape))
    finish(writer)
    assert open_folder(tmp_path / "model.gguf").generation == GenerationDefaults(temperature=0.25, top_k=20)


def test_a_model_in_parts_is_one(file: Path, tmp_path: Path) -> None:
    reader = GGUFReader(file)
    for part in (0, 1):
        writer = GGUFWriter(tmp_path / f"m-0000{part + 1}-of-00002.gguf", "llama")
        if part == 0:
            from tests.model.weights.gguf.made import published

            write_config(writer, published("llama2"))
            write_tokenizer(writer)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[part::2]:
            writer.add_tensor(tensor.name, tensor.data.copy())
        finish(writer)
    folder, whole = open_folder(tmp_path), open_folder(file)
    assert folder.config == whole.config and folder.nbytes == whole.nbytes
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"m-00002-of-00002\.gguf does not exist"):
        open_folder(tmp_path)


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen3", "gemma3", "mixtral", "phi3", "olmo2", "qwen2"])
def test_an_exported_file_is_the_model_again(family: str, tmp_path: Path, mesh: Mesh) -> None:
    """From a GGUF file by way of ours; what package gguf reads of it is what llama.cpp would."""
    changes = {"query_pre_attn_scalar": 12} if family == "gemma3" else {}
    source = write_gguf(tmp_path / "source.gguf", family, **changes)
    quiet = Console(file=StringIO())
    convert(ConvertConfig(source, tmp_path / "out.gguf", gguf="f32"), quiet)
    want = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    got = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-6, atol=2e-7, err_msg=name)
    one, other = open_folder(source), open_folder(tmp_path / "out.gguf")
    assert other.tokenizer.eos_ids == one.tokenizer.eos_ids and other.chat is not None
    assert other.config == one.config


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16", "bf16"])
def test_matrices_are_written_in_the_kind_that_was_asked_for(kind: str, tmp_path: Path) -> None:
    tensors, sizes = wide_llama()
    source = write_gguf(tmp_path / "source.gguf", "llama2", tensors=tensors, **sizes)
    convert(ConvertConfig(source, tmp_path / "out.gguf", gguf=kind), Console(file=StringIO()))  # type: ignore[arg-type]
    number = GGMLQuantizationType[kind.upper()]
    for name, stored in read_header(tmp_path / "out.gguf").tensors.items():
        before = read_header(source).tensors[name]
        assert stored.shape == before.shape
        plain = np.frombuffer(before.memory, np.float32, int(np.prod(before.shape)), before.start).reshape(before.shape)
        expected = "F32" if len(stored.shape) == 1 else kind.upper()
        if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
            expected, number = "Q8_0", GGMLQuantizationType.Q8_0
        assert stored.kind.name == expected, name
        if len(stored.shape) > 1:
            number = GGMLQuantizationType[expected]
            written = np.frombuffer(stored.memory, np.uint8, stored.nbytes, stored.start)
            np.testing.assert_array_equal(written, gguf.quantize(plain, number).view(np.uint8).reshape(-1))


def test_what_a_file_can_not_say_is_refused(tmp_path: Path) -> None:
    """deepseek has another layout; Gemma's scale is one that readers guess from its size."""
    gemma = write_gguf(tmp_path / "gemma.gguf", "gemma3", query_pre_attn_scalar=12)
    convert(ConvertConfig(gemma, tmp_path / "folder", to="huggingface"), Console(file=StringIO()))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "query_pre_attn_scalar": 18}))
    with pytest.raises(ConfigError, match="a GGUF file can't say attention_scale"):
        convert(ConvertConfig(tmp_path / "folder", tmp_path / "out.gguf", gguf="f32"), Console(file=StringIO()))
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob("isthmus-gguf-*"))


def test_a_file_becomes_a_folder_of_the_same_logits(file: Path, tmp_path: Path, mesh: Mesh) -> None:
    """`isthmus convert file.gguf folder --to huggingface`: transformers' own numbers come out."""
    convert(ConvertConfig(file, tmp_path / "folder", to="huggingface"), Console(file=StringIO()))
    folder, truth = open_folder(tmp_path / "folder"), golden("llama2")
    params = folder.load_params(mesh)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    logits = np.asarray(_logits(folder.config)(params, batch_of(truth["tokens"], truth["lengths"])))
    for row, length in enumerate(truth["lengths"]):
        assert relative_error(logits[row, :length], truth["logits"][row, :length]) <= TOLERANCE
