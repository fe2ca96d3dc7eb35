"""A GGUF file may be anybody's, or half of one: what it says is believed as far as it fits, and no error is a crash."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from isthmus.errors import ConfigError
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.gguf.architectures import config_of
from isthmus.model.weights.gguf.files import read_headers
from isthmus.model.weights.gguf.header import Header, read_header
from isthmus.model.weights.gguf.metadata import Metadata
from isthmus.model.weights.hub import FolderOptions
from tests.model.weights.gguf.made import write_gguf
from tests.model.weights.gguf.test_families import wide_llama


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tensors, sizes = wide_llama()
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, "llama2", GGMLQuantizationType.Q8_0, tensors, **sizes).read_bytes()


def put(data: bytes, at: int, number: int, size: int = 8) -> bytes:
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def after(data: bytes, name: bytes) -> int:
    """The place behind a key of the metadata, or the name of a tensor."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not GGUF": (lambda data: b"GGML" + data[4:], "is not a GGUF file: it begins with b'GGML'"),
    "empty": (lambda data: b"", "is not a GGUF file"),
    "version 1": (lambda data: put(data, 4, 1, 4), "it is of version 1; 2 and 3 are read"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "it is big-endian"),
    "2^60 tensors": (lambda data: put(data, 8, 1 << 60), "tensors don't fit into it"),
    "2^60 keys": (lambda data: put(data, 16, 1 << 60), "entries of metadata don't fit into it"),
    "2^60 tokens": (
        lambda data: put(data, after(data, b"tokenizer.ggml.tokens") + 8, 1 << 60),
        r"strings in tokenizer\.ggml\.tokens don't fit",
    ),
    "2^60 types": (
        lambda data: put(data, after(data, b"tokenizer.ggml.token_type") + 8, 1 << 60),
        r"numbers in tokenizer\.ggml\.token_type don't fit",
    ),
    "a list of lists": (
        lambda data: put(data, after(data, b"tokenizer.ggml.token_type") + 4, 9, 4), "is a list of type 9",
    ),
    "a key twice": (
        lambda data: data.replace(b"llama.attention.value_length", b"llama.attention.key_length\0\0")
        .replace(b"\x1c\0\0\0\0\0\0\0llama.attention.key_length\0\0", b"\x1a\0\0\0\0\0\0\0llama.attention.key_length"),
        r"'llama\.attention\.key_length' is in its metadata twice",
    ),
    "a type of value": (lambda data: put(data, after(data, b"llama.block_count"), 77, 4), "unknown type 77"),
    "layers": (lambda data: put(data, after(data, b"llama.block_count") + 4, 0, 4), r"block_count=0 must be 1 to"),
    "more layers": (lambda data: put(data, after(data, b"llama.block_count") + 4, 9, 4), "and the files hold 1 layers"),
    "a kind": (
        lambda data: put(data, after(data, b"blk.0.ffn_up.weight") + 20, 29, 4),
        "is of the kind IQ1_M, which is not read here; quantize the model to one of",
    ),
    "a shape": (
        lambda data: put(data, after(data, b"blk.0.ffn_up.weight") + 4, 1 << 50), "it is damaged",
    ),
    "a row": (lambda data: put(data, after(data, b"blk.0.ffn_up.weight") + 4, 33), "are no whole blocks of Q8_0"),
    "an offset": (lambda data: put(data, after(data, b"blk.0.ffn_up.weight") + 24, 1 << 40), "and the file at"),
    "axes": (lambda data: put(data, after(data, b"blk.0.ffn_up.weight"), 99, 4), "has 99 axes"),
    "the end gone": (lambda data: data[:-1], "it is cut short, or damaged"),
    "another architecture": (
        lambda data: data.replace(b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0llama",
                                  b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0mamba"),
        "general.architecture='mamba' is not supported; those that are: llama, qwen2",
    ),
    "another tokenizer": (
        lambda data: data.replace(b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0bert"),
        r"tokenizer\.ggml\.model='bert' is not supported; only 'gpt2' and 'llama' are",
    ),
    "another pre-tokenizer": (
        lambda data: data.replace(b"\5\0\0\0\0\0\0\0gpt-2", b"\5\0\0\0\0\0\0\0gpt-9"),
        r"tokenizer\.ggml\.pre='gpt-9' is not supported",
    ),
    "a token's id": (
        lambda data: put(data, after(data, b"tokenizer.ggml.eos_token_id") + 4, 96, 4), "must be below 96",
    ),
    "a scale": (
        lambda data: data[:-34] + b"\0\x7c" + data[-32:], "holds numbers that are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, whole: bytes, tmp_path: Path, mesh: Mesh) -> None:
    damage, message = DAMAGE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole, "nothing was damaged"
    with pytest.raises(ConfigError, match=message) as caught:
        open_folder(path).load_params(mesh)
    assert str(path) in str(caught.value)


def test_a_file_that_ends_anywhere_is_an_error(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for size in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            read_header(path)


@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_make_a_model_or_an_error(
    places: list[tuple[float, int]], whole: bytes, tmp_path_factory: object
) -> None:
    """Bytes of the header changed at random: no exception but the one that names the file."""
    path = tmp_path_factory.getbasetemp() / "changed.gguf"  # type: ignore[attr-defined]
    end = after(whole, b"blk.0.ffn_down.weight")
    changed = bytearray(whole)
    for place, value in places:
        changed[int(place * (end - 1))] = value
    path.write_bytes(changed)
    try:
        open_folder(path)
    except ConfigError as error:
        assert str(error)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        open_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        open_folder(tmp_path / "model.gguf")


def test_a_key_that_may_change_the_model_is_not_passed_over(tmp_path: Path, whole: bytes) -> None:
    """As a field of config.json: llama.cpp may compute something else by it."""
    path = tmp_path / "model.gguf"
    key = b"llama.attention.key_length"
    path.write_bytes(whole.replace(key, b"llama.attention.kee_length"))
    message = re.escape("llama.attention.kee_length=32 is not supported, and may change what the model computes; to go "
                        "on without it: ignore_field= (--ignore-field llama.attention.kee_length)")  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        open_folder(path)
    assert open_folder(path, FolderOptions(ignore_field=("llama.attention.kee_length",))).config.head_dim == 32


COUNTS = [np.array([1, 2]), np.array([1]), True, 1.0, "2", ["2"], -1]


@pytest.mark.parametrize("name", ["split.count", "split.tensors.count"])
@pytest.mark.parametrize("value", COUNTS, ids=repr)
def test_counts_of_parts_are_whole_numbers(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array ended in a traceback, and true was taken for 1."""
    monkeypatch.setattr(
        "isthmus.model.weights.gguf.files.read_header", lambda path: Header(path, {"split.count": 2, name: value}, {})
    )
    with pytest.raises(ConfigError, match=rf"m-00001-of-00002\.gguf: {name}=.* must be a whole number"):
        read_headers(tmp_path / "m-00001-of-00002.gguf")


def test_a_file_put_together_from_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's gguf-split --merge leaves split.count=0."""
    whole = Header(tmp_path / "m.gguf", {"split.count": 0}, {})
    monkeypatch.setattr("isthmus.model.weights.gguf.files.read_header", lambda path: whole)
    assert read_headers(whole.path) is whole


def config(data: bytes, path: Path, ignore: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    path.write_bytes(data)
    header = read_header(path)
    more = {f"llama.{name.replace('__', '.')}": value for name, value in changes.items()}
    return config_of(Metadata(header.metadata | more, path, ignore), header)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope__scaling__type": "yarn", "rope__scaling__factor": -2.0, "rope__scaling__attn_factor": 2.0},
     r"rope\.scaling\.factor=-2\.0 must be positive"),
    ({"rope__scaling__type": "linear", "rope__scaling__factor": -2.0}, "must be positive"),
    ({"rope__scale_linear": -2.0}, r"rope\.scale_linear=-2\.0 must be positive"),
    ({"rope__scaling__attn_factor": 2.0}, r"--ignore-field llama\.rope\.scaling\.attn_factor"),
    ({"rope__scaling__attn_factor": 0.0}, r"--ignore-field llama\.rope\.scaling\.attn_factor"),
    ({"rope__scaling__type": "linear", "rope__scaling__factor": 2.0, "rope__scaling__attn_factor": 2.0},
     r"--ignore-field llama\.rope\.scaling\.attn_factor"),
    ({"rope__dimension_count": 5}, r"rope\.dimension_count=5 must be even"),
    ({"attention__key_length": 0, "attention__value_length": 0}, r"attention\.key_length=0 must be at least 1"),
])  # fmt: skip
def test_a_rope_that_can_not_be_is_named(changes: dict[str, Any], message: str, whole: bytes, tmp_path: Path) -> None:
    """Some ended in a traceback; others were passed over, and the model computed something else than llama.cpp."""
    with pytest.raises(ConfigError, match=rf"model\.gguf: llama\..*{message}"):
        config(whole, tmp_path / "model.gguf", **changes)


def test_a_factor_of_attention_is_taken_off_or_harmless(whole: bytes, tmp_path: Path) -> None:
    path, key = tmp_path / "model.gguf", "llama.rope.scaling.attn_factor"
    plain = config(whole, path)
    assert config(whole, path, rope__scaling__attn_factor=1.0) == plain
    assert config(whole, path, (key,), rope__scaling__attn_factor=2.0) == plain


@pytest.mark.parametrize("name", ["rope__scaling__factor", "rope__scale_linear"])
def test_a_factor_without_a_kind_is_linear(name: str, whole: bytes, tmp_path: Path) -> None:
    """As llama.cpp has it; it was passed over."""
    found = config(whole, tmp_path / "model.gguf", **{name: 4.0})
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_an_unknown_list_of_strings_takes_no_memory(whole: bytes, tmp_path: Path) -> None:
    """numpy would make each as long as the longest: 4 TB."""
    with pytest.raises(ConfigError, match=r"llama\.words=.* is not supported"):
        config(whole, tmp_path / "model.gguf", words=["x" * 1_000_000, *[""] * 1_000_000])
