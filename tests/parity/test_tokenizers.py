"""Tokens, texts and defaults are what transformers makes of the same folder."""

from __future__ import annotations

import json
import random
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from isthmus.model.text.endings import unheeded_flags
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import open_folder
from tests.model.text.tokenizers import KINDS
from tests.model.weights.huggingface.folders import write_folder
from tests.parity.test_chat_templates import PEERS

TEXTS = ["a b", "", "  ab\n a", "<s>a</s> b", "<|turn|>a<|turn|>", "é漢😀!", "<tool é> a", "a" * 40]
KEPT = ["llama2", "gemma", "byte_level", "unigram", "wordpiece"]
CLASSES = [None, "TokenizersBackend", "PreTrainedTokenizerFast", "LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer"]
FLAGS: list[dict[str, bool]] = [
    {}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True},
]  # fmt: skip
SURROUNDED = ["<s>", "<s></s>", "", None]
"""By the post-processor"""
GENERATION = [
    "{}", '{"do_sample": false, "temperature": 0.7}', '{"temperature": 0.7}', '{"do_sample": true}',
    '{"eos_token_id": 2}', '{"do_sample": true, "temperature": 0.6, "top_p": 0.9}', '{"do_sample": null}',
]  # fmt: skip


TURN = {"content": "<|turn|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
DECLARED: list[dict[str, Any]] = [
    {},
    {"eos_token": "<|turn|>"},
    {"eos_token": {**TURN, "special": True, "__type": "AddedToken"}},
    {"extra_special_tokens": ["<|turn|>"]},
    {"extra_special_tokens": {"turn_token": "<|turn|>"}},
    {"additional_special_tokens": ["<|turn|>", "<new>"]},
    {"added_tokens_decoder": {"3": {**TURN, "special": True}}},
    {"added_tokens_decoder": {"3": {**TURN, "special": False}}},
    {"added_tokens_decoder": {"3": {**TURN, "special": True, "rstrip": True}}},
]


def pruned(folder: Path, kind: str, declared: dict[str, Any], special: bool | None) -> Path:
    """A folder in whose tokenizer.json <|turn|> is a mere word (None), or an added token that is special or isn't."""
    written(folder, kind, "TokenizersBackend", {}, "<s>")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    if special is None:
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|turn|>"]
    for token in spec["added_tokens"]:
        token["special"] &= token["content"] != "<|turn|>" or bool(special)
    path.write_text(json.dumps(spec))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | declared))
    return folder


def written(folder: Path, kind: str, name: str | None, flags: dict[str, bool], around: str | None) -> Path:
    write_folder(folder, "llama3", vocab_size=400)
    inner = KINDS[kind]()
    if around is None:
        inner.post_processor = None
    else:
        template = around.replace("<s>", "<s> $A") if around else "$A"
        tokens = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>") if token in around]
        inner.post_processor = processors.TemplateProcessing(template.replace("</s>", " </s>"), special_tokens=tokens)
    inner.enable_truncation(3)
    inner.enable_padding(length=64)
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **flags}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"tokenizer_class": name} if name else {})))
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Folders, and what transformers makes of each."""
    if not PEERS.is_file():
        pytest.skip("no .venv-peers: `make peers` builds it")
    base = tmp_path_factory.mktemp("tokenizers")
    made: list[dict[str, Any]] = []
    chosen = [
        *product(KEPT, CLASSES[1:3], FLAGS[:1], SURROUNDED[:1]),
        *product(["llama2", "byte_level"], CLASSES, FLAGS, SURROUNDED),
    ]
    declared = list(product(["llama2", "byte_level"], DECLARED, [None, False, True]))
    for number, choice in enumerate([*chosen, *declared]):
        if len(choice) == 4:
            kind, name, flags, _ = choice
            folder = written(base / str(number), *choice)
        else:
            (kind, *_), name, flags = choice, "TokenizersBackend", {}
            folder = pruned(base / str(number), *choice)
        generation = GENERATION[number % len(GENERATION)]
        (folder / "generation_config.json").write_text(generation)
        size = Tokenizer.load(folder / "tokenizer.json").vocab_size
        rng = random.Random(number)
        ids = [[rng.randrange(size) for _ in range(rng.randrange(1, 20))] for _ in range(20)]
        made.append({"folder": str(folder), "kind": kind, "class": name, "flags": flags, "texts": TEXTS, "ids": ids})
    source, target = base / "in.json", base / "out.json"
    source.write_text(json.dumps(made))
    script = Path(__file__).with_name("hf_tokenizer.py")
    subprocess.run([str(PEERS), str(script), str(source), str(target)], check=True, timeout=300)
    return [case | {"theirs": theirs} for case, theirs in zip(made, json.loads(target.read_text()), strict=True)]


@pytest.mark.peers
def test_the_tokens_around_a_text_are_those_of_transformers(cases: list[dict[str, Any]]) -> None:
    """A model that never saw a text without its first token would answer worse without a sign of it."""
    warned = 0
    for case in cases:
        folder = Path(case["folder"])
        tokenizer = open_folder(folder).tokenizer
        theirs, ours = case["theirs"]["plain"][0], tokenizer.encode(TEXTS[0])
        edges = [tokenizer.token_id(token) for token in ("<s>", "</s>")]
        assert [theirs[0] == edges[0], theirs[-1] == edges[1]] == [ours[0] == edges[0], ours[-1] == edges[1]], case
        said = unheeded_flags(folder, tokenizer)
        want = [case["flags"].get(flag) for flag in ("add_bos_token", "add_eos_token")]
        does = [theirs[0] == edges[0], theirs[-1] == edges[1]]
        assert len(said) == sum(a is not None and a != b for a, b in zip(want, does, strict=True)), (case, said)
        assert open_folder(folder).warnings == said
        warned += len(said)
    assert warned > 20


@pytest.mark.peers
def test_tokens_and_texts_are_those_of_transformers(cases: list[dict[str, Any]]) -> None:
    """Special tokens written out in a prompt became 28 tokens where transformers makes 10; and what was saved with the
    tokenizer cut every prompt."""
    for case in cases:
        if case["class"] not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            continue  # others build the tokenizer anew, and leave out parts of tokenizer.json
        tokenizer = open_folder(Path(case["folder"])).tokenizer
        assert [tokenizer.encode(text, parse_special=True) for text in TEXTS] == case["theirs"]["special"], case
        assert [tokenizer.encode(text) for text in TEXTS] == case["theirs"]["plain"], case
        for ids, text in zip(case["ids"], case["theirs"]["decoded"], strict=True):
            stream = tokenizer.stream()
            assert "".join(stream.push([token]) for token in ids) + stream.flush() == text == tokenizer.decode(ids)


@pytest.mark.peers
def test_a_model_is_greedy_where_transformers_is(cases: list[dict[str, Any]]) -> None:
    """A published model without do_sample drew at temperature 1."""
    greedy = {case["theirs"]["greedy"] for case in cases}
    assert greedy == {True, False}
    for case in cases:
        recommended = open_folder(Path(case["folder"])).generation
        assert (recommended.temperature == 0.0) == case["theirs"]["greedy"], case
