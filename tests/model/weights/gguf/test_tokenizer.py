"""The tokenizer that a GGUF file describes gives the ids of the tokenizer.json that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from isthmus.errors import ConfigError
from isthmus.model.text.tokenizer_file import PATTERNS
from isthmus.model.weights.folder import open_folder
from isthmus.model.weights.gguf.metadata import Metadata
from isthmus.model.weights.gguf.tokenizer import MAX_CUTTING, tokenizer_of
from isthmus.model.weights.gguf.tokenizer_export import tokenizer_metadata
from tests.model.weights.gguf.made import finish, published, write_config

TEXTS = [
    "Hello  world, it's 1234567 of them!\n\n  def f(x):\n\treturn x+1  # ok   ",
    "Größe, e\u0301 und ½; 東京は日本の首都です。 Привет, мир! 🙂\r\n", " leading", "",
    "\u2581 a<s>b</s> <|im_end|> <think>x",
    "WE'LL see McDonald's HTTPServer2 a.b/c://d", "          ten spaces, \u00a0 another",
]  # fmt: skip
TRAINED_ON = [*TEXTS * 3, "the quick brown fox jumps over the lazy dog " * 20, "1 22 333 4444 55555 " * 5]
STEPS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(PATTERNS["llama3"]), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), "isolated")],
    "tekken": [pre_tokenizers.Split(Regex(PATTERNS["tekken"]), "isolated")],
    "gpt-4o": [pre_tokenizers.Split(Regex(PATTERNS["gpt-4o"]), "isolated")],
}


def byte_level(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    whole = pre in ("gpt-2", "smollm")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*STEPS[pre], level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def sentence_piece(prefix: bool) -> Tokenizer:
    """BPE over characters, with bytes for those that it hasn't: as Llama 2's and Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    before = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=40, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def write(path: Path, tokenizer: Tokenizer, more: dict[str, Any]) -> Path:
    """A file of one layer with this vocabulary, as llama.cpp's converter writes it down."""
    spec = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    added = {token["content"]: token["special"] for token in spec["added_tokens"]}
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    types = [
        kinds[added[token]] if token in added else TokenType.BYTE if token.startswith("<0x") else TokenType.NORMAL
        for token in tokens
    ]
    config = {**published("llama2"), "num_hidden_layers": 1, "vocab_size": len(tokens)}
    writer = GGUFWriter(path, "llama")
    write_config(writer, config)
    for key, value in more.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    dim, mlp, size = 40, 56, 10
    shapes = {"token_embd": (len(tokens), dim), "output_norm": (dim,), "blk.0.attn_norm": (dim,),
              "blk.0.ffn_norm": (dim,), "blk.0.attn_q": (4 * size, dim), "blk.0.attn_k": (2 * size, dim),
              "blk.0.attn_v": (2 * size, dim), "blk.0.attn_output": (dim, 4 * size), "blk.0.ffn_gate": (mlp, dim),
              "blk.0.ffn_up": (mlp, dim), "blk.0.ffn_down": (dim, mlp)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    finish(writer)
    return path


def scores(tokenizer: Tokenizer) -> list[float]:
    """As SentencePiece's: the later a token was made, the lower."""
    return [-float(index) for index in range(tokenizer.get_vocab_size())]


def check(path: Path, tokenizer: Tokenizer) -> None:
    got = open_folder(path).tokenizer
    for text in TEXTS:
        tokenizer.encode_special_tokens = True
        assert got.encode(text) == tokenizer.encode(text).ids, text
        tokenizer.encode_special_tokens = False
        assert got.encode(text, parse_special=True) == tokenizer.encode(text).ids, text
        ids = got.encode(text, parse_special=True)
        assert got.decode(ids) == tokenizer.decode(ids), text


@pytest.mark.parametrize("pre", STEPS)
def test_a_byte_level_tokenizer_cuts_text_as_its_own_file_does(pre: str, tmp_path: Path) -> None:
    """Cut otherwise, a model is shown tokens that it never saw together; it answers worse, and nobody is told."""
    tokenizer = byte_level(pre)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    more = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }  # fmt: skip
    check(write(tmp_path / "model.gguf", tokenizer, more), tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_put_pieces_together_as_merges_do(prefix: bool, tmp_path: Path) -> None:
    """SentencePiece's: files have no merges; a word's score says when it is put together."""
    tokenizer = sentence_piece(prefix)
    more = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores(tokenizer),
        "tokenizer.ggml.add_space_prefix": prefix, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    check(write(tmp_path / "model.gguf", tokenizer, more), tokenizer)


@pytest.mark.parametrize(("kind", "said", "begins"), [
    ("llama", None, True), ("llama", False, False), ("gpt-2", None, False), ("gpt-2", True, True),
    ("llama-bpe", None, True),
])  # fmt: skip
def test_the_beginning_is_marked_as_llama_cpp_marks_it(
    kind: str, said: bool | None, begins: bool, tmp_path: Path
) -> None:
    """Without the token that a model was trained to see first, or with one it never saw, its first words go astray."""
    tokenizer = sentence_piece(False) if kind == "llama" else byte_level(kind)
    more: dict[str, Any] = {"tokenizer.ggml.bos_token_id": tokenizer.token_to_id("<s>")}
    if kind == "llama":
        more |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores(tokenizer)}
    else:
        more |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": kind, "tokenizer.ggml.merges": ["a b"]}
    if said is not None:
        more["tokenizer.ggml.add_bos_token"] = said
    got = open_folder(write(tmp_path / "model.gguf", tokenizer, more)).tokenizer.encode("")
    assert got == ([tokenizer.token_to_id("<s>")] if begins else [])


@pytest.mark.parametrize("name", [*STEPS, "prefix", "no prefix"])
def test_an_exported_tokenizer_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(name) if name in STEPS else sentence_piece(name == "prefix")
    spec = json.loads(tokenizer.to_str())
    more = tokenizer_metadata(spec, {"unk_token": "<unk>"}, [2], [], tokenizer.get_vocab_size())
    tokens, types = more.pop("tokenizer.ggml.tokens"), more.pop("tokenizer.ggml.token_type")
    vocabulary = tokenizer.get_vocab()
    assert tokens == sorted(vocabulary, key=vocabulary.__getitem__) or name not in STEPS
    assert types[tokenizer.token_to_id("</s>")] == TokenType.CONTROL
    check(write(tmp_path / "model.gguf", tokenizer, more), tokenizer)


def test_a_pre_tokenizer_that_llama_cpp_has_not_is_refused() -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    with pytest.raises(ConfigError, match="no pre-tokenizer that cuts text"):
        tokenizer_metadata(json.loads(tokenizer.to_str()), {}, [2], [], 421)


def test_long_tokens_are_refused_before_they_are_put_together() -> None:
    """A vocabulary of 1.5 MB made half a million merges of 250 MB in 15 s, and was refused afterwards."""
    tokens = ["a" * size for size in range(1, 1000)]
    values = {
        "general.architecture": "llama", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=rf"m\.gguf: tokenizer\.ggml\.tokens=.* more than {MAX_CUTTING:,}"):
        tokenizer_of(Metadata(values, Path("m.gguf")))
    few = values | {
        "tokenizer.ggml.tokens": tokens[:500],
        "tokenizer.ggml.scores": values["tokenizer.ggml.scores"][:500],
    }
    assert len(tokenizer_of(Metadata(few, Path("m.gguf")))["model"]["merges"]) == 500 * 499 // 2
