"""A tokenizer.json is somebody else's: what it says can't cut a prompt, end the process or keep it busy for ever."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner

from isthmus.errors import ConfigError
from isthmus.model.text import tokenizer_trial
from isthmus.model.text.tokenizer import TextError, Tokenizer
from isthmus.model.text.tokenizer_file import KNOWN_PATTERNS, examine
from tests.model.text.tokenizers import KINDS, byte_level, gemma, llama2

TEXT = "a b 漢 ab"


def saved(folder: Path, inner: Inner, **changes: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(inner.to_str()) | changes))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_and_padding_of_training_are_not_done(kind: str, tmp_path: Path) -> None:
    """A prompt of 16 tokens became 8 and 24 pads, and `train --init` learned from 32 tokens of a whole book."""
    inner = KINDS[kind]()
    want = inner.encode(TEXT).ids
    inner.enable_truncation(2)
    inner.enable_padding(length=32, pad_id=1)
    tokenizer = Tokenizer.load(saved(tmp_path, inner))
    assert len(inner.encode(TEXT)) == 32 and tokenizer.encode(TEXT) == want
    assert tokenizer.encode(TEXT, parse_special=True) == want
    assert tokenizer.encode_batch([TEXT, "a"])[0] == want
    assert [tokenizer.encode_chat(TEXT), tokenizer.encode_chat_batch([TEXT])[0][0]] == [want[1:]] * 2
    tokenizer.save(tmp_path / "again.json")
    assert Tokenizer.load(tmp_path / "again.json").encode(TEXT) == want


def test_padding_to_any_length_is_harmless(tmp_path: Path) -> None:
    """The library asks for as much memory as it says, and aborts the process."""
    inner = gemma()
    want = inner.encode(TEXT).ids
    inner.enable_padding(length=10**9)
    assert Tokenizer.load(saved(tmp_path, inner)).encode(TEXT) == want


def test_dropout_of_training_is_not_done(tmp_path: Path) -> None:
    """A prompt would be other tokens each time."""
    inner = byte_level()
    want = inner.encode(TEXT * 50).ids
    inner.model.dropout = 0.5
    tokenizer = Tokenizer.load(saved(tmp_path, inner))
    assert tokenizer.encode(TEXT * 50) == want == tokenizer.encode(TEXT * 50, parse_special=True)


def test_an_id_may_be_higher_than_there_are_tokens(tmp_path: Path) -> None:
    """A tokenizer from which tokens were taken refused its own prompts, and could never draw its end."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<|end|>": 7}, "unk_token": "a"}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    path = saved(tmp_path, KINDS["words"](), model=model, added_tokens=[{"id": 7, "content": "<|end|>", **added}])
    spec = json.loads(path.read_text()) | {"post_processor": None}
    path.write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 8 == Tokenizer(tokenizer._inner).vocab_size
    assert tokenizer.encode_chat("a<|end|>b") == [0, 7, 1] == tokenizer.encode("a<|end|>b", parse_special=True)
    assert tokenizer.encode("a") == [0] and tokenizer.decode([0, 5, 7, 1]) == "a b"
    spec["model"]["vocab"].pop("<|end|>")
    path.write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"'<\|end\|>' can't have the id 7.* gets 2"):
        Tokenizer.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_id_is_the_librarys(kind: str, tmp_path: Path) -> None:
    """As above."""
    inner = KINDS[kind]()
    tokenizer = Tokenizer.load(saved(tmp_path, inner))
    assert tokenizer.vocab_size == max(inner.get_vocab().values()) + 1 == Tokenizer(inner).vocab_size


def much(step: Any, count: int) -> Callable[[Inner], None]:
    def change(inner: Inner) -> None:
        inner.normalizer = normalizers.Sequence([step] * count)

    return change


def nested(inner: Inner) -> None:
    inner.normalizer = normalizers.Sequence([normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 4)])


def decoder(inner: Inner) -> None:
    inner.decoder = decoders.Sequence([decoders.Replace("a", "a" * 1000)] * 4)


def repeated(inner: Inner) -> None:
    inner.post_processor = processors.TemplateProcessing(" ".join(["$A"] * 1000))


def surrounded(inner: Inner) -> None:
    inner.post_processor = processors.TemplateProcessing("</s> " * 1000 + "$A", special_tokens=[("</s>", 2)])


def many_ids(inner: Inner) -> None:
    tokens = [{"id": "x", "ids": [1] * 1000, "tokens": ["<s>"] * 1000}]
    inner.post_processor = processors.TemplateProcessing("x $A", special_tokens=tokens)


def split(pattern: str) -> Callable[[Inner], None]:
    def change(inner: Inner) -> None:
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")

    return change


def replaced(inner: Inner) -> None:
    inner.normalizer = normalizers.Replace(Regex("(a|aa)+$"), "b")


def long_token(inner: Inner) -> None:
    inner.add_tokens([AddedToken("b" * 70_000)])


HOSTILE: dict[str, tuple[Callable[[Inner], None], str]] = {
    "a letter becomes 10^12": (much(normalizers.Replace("a", "a" * 1000), 4), "normalizer: it makes up to 1000 bytes"),
    "in steps": (much(normalizers.Replace("a", "aaaa"), 5), "normalizer: it makes up to 1024 bytes"),
    "by a pattern": (much(normalizers.Replace(Regex("q?"), "aaaa"), 4), "normalizer: it makes up to 625 bytes"),
    "in front": (much(normalizers.Prepend("aaaaaa"), 3), "normalizer: it makes up to 343 bytes"),
    "one inside another": (nested, "normalizer: it makes up to 1000 bytes"),
    "of an answer": (decoder, "decoder: it makes up to 1000 bytes"),
    "a text becomes a thousand": (repeated, "post_processor: it writes a text more than once"),
    "a thousand tokens around it": (surrounded, "post_processor: it puts 1000 tokens"),
    "a thousand at once": (many_ids, "post_processor: it puts 1000 tokens"),
    "a long token": (long_token, "a token has 70000 characters"),
    "exponential time": (split("(a+)+$"), r"regular expression .*\(a\+\)\+\$"),
    "in what is replaced": (replaced, r"regular expression .*\(a\|aa\)\+\$"),
    "cubic time": (split(r"\s*\s*\s*\s*[x\d]"), "regular expression"),
    "quadratic time": (split(r"\w+\s*$"), "regular expression"),
    "quadratic time, of one letter": (split(r"q*Q|."), "regular expression"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_would_end_the_process_is_refused(case: str, tmp_path: Path) -> None:
    """One letter of a prompt would end the server, or keep it busy for ever."""
    inner = llama2()
    change, said = HOSTILE[case]
    change(inner)
    with pytest.raises(ConfigError, match=said) as refused:
        Tokenizer.load(saved(tmp_path, inner))
    assert "tokenizer.json" in str(refused.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{}", "is not a tokenizer"),
        (b"[]", "is not a JSON object"),
        (b"\xff", "can't be read as UTF-8"),
        (b"[" * 100_000, "can't be read as JSON"),
        (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "is not a tokenizer"),
        (b'{"model": 3, "added_tokens": {}, "normalizer": [1], "decoder": {"type": "Sequence"}}', "is not a"),
        (b'{"post_processor": {"single": [3], "special_tokens": {"a": 1}}, "model": {"vocab": [[]]}}', "is not a"),
        (b'{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "%"}}', "is not a tokenizer"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    """A traceback says nothing of the file."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s)tokenizer\.json.*{said}"):
        Tokenizer.load(path)


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    """It would be read until memory is full, or for ever."""
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(ConfigError, match="has more than 256 MiB"):
        Tokenizer.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is a named pipe"):
        Tokenizer.load(path)


def test_published_tokenizers_are_taken(tmp_path: Path) -> None:
    """A limit against abuse must not refuse what people use: T5's is the one that makes most of a byte."""
    inner = KINDS["unigram"]()
    # As SentencePiece writes them: an empty trie, and what U+FDFA becomes.
    charsmap = (0).to_bytes(4, "little") + "صلى الله عليه وسلم".encode() + b"\0"
    path = saved(tmp_path, inner)
    spec = json.loads(path.read_text())
    precompiled = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    replace = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [precompiled, replace]}
    path.write_text(json.dumps(spec))
    assert examine(path).growth == 33 * 4
    for pattern in sorted(KNOWN_PATTERNS):
        inner = byte_level()
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        )
        assert Tokenizer.load(saved(tmp_path, inner)).encode(TEXT)


def test_a_pattern_nobody_knows_is_tried_out_and_taken(tmp_path: Path) -> None:
    """The list of known ones can't keep up with what is published."""
    inner = byte_level()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Lu}?\p{Ll}+|\p{N}{1,2}|.|\s"), "isolated"),
            pre_tokenizers.ByteLevel(use_regex=False),
        ]
    )
    tokenizer = Tokenizer.load(saved(tmp_path, inner))
    assert tokenizer.decode(tokenizer.encode("ab12")) == " ab 12", "a space before each piece, as asked"


def test_what_lies_where_the_command_runs_takes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many have a folder called model: it was imported in place of ours, and a trial that never ran found nothing."""
    (tmp_path / "model").mkdir()
    for name in ("__init__.py", "tokenizer_trial.py"):
        (tmp_path / "model" / name).write_text("raise SystemExit(0)")
    inner = byte_level()
    split("(a+)+$")(inner)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a regular expression in it takes time"):
        Tokenizer.load(saved(tmp_path, inner))


@pytest.mark.parametrize("address_space", ["unlimited", 4 << 20])
def test_a_trial_runs_within_the_limits_that_it_is_given(address_space: object, tmp_path: Path) -> None:
    """Under ulimit -v, in KiB, it couldn't set its own limit, and was taken for one that found nothing."""
    inner = byte_level()
    split("a+")(inner)
    words = [sys.executable, "-P", tokenizer_trial.__file__, str(saved(tmp_path, inner)), "8"]
    command = ["sh", "-c", f'ulimit -v {address_space}; exec "$@"', "sh", *words]
    done = subprocess.run(command, input='["a+"]', capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_trial_that_cannot_run_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "__file__", str(tmp_path / "gone.py"))
    inner = byte_level()
    split("a+")(inner)
    with pytest.raises(ConfigError, match=r"can't be tried out: .*gone.py"):
        Tokenizer.load(saved(tmp_path, inner))


def test_limits_hold_for_every_text() -> None:
    """A text that no trial had would still end the server, in an error that isn't even an Exception."""
    inner = gemma()
    split("(?:q|qw|w)+!z")(inner)
    tokenizer = Tokenizer(inner)
    assert tokenizer.encode("qw!z")
    for encode in (tokenizer.encode, tokenizer.encode_chat, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(TextError, match="gives up on it"):
            encode("qw" * 100)
    tokenizer = Tokenizer(gemma(), growth=1 << 20)
    assert tokenizer.encode("a" * 256)
    for encode in (tokenizer.encode, tokenizer.encode_chat):
        with pytest.raises(TextError, match="has 257 characters; this model's tokenizer takes 256"):
            encode("a" * 257)
