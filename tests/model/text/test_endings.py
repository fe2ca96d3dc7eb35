"""What a model writes ends where its makers meant it to, in a chat too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Inner

from isthmus.errors import ConfigError
from isthmus.model.text.added_tokens import declared_tokens
from isthmus.model.text.chat import ChatTemplate
from isthmus.model.text.endings import turn_end, unheeded_flags
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import open_folder
from isthmus.train.documents import Document
from isthmus.train.examples import FineTuning
from tests.model.text.test_answers import THOUGHTS
from tests.model.text.test_chat import CHATML, CLOSED, HEADERS, TURNS, answer, user
from tests.model.text.tokenizers import llama2
from tests.model.weights.huggingface.folders import write_folder

EOS, TURN, END, OTHER = 0, 90, 91, 92
SPELT = {TURN: "<|im_end|>", END: "<|end|>", OTHER: "<turn>"}
RETURNS = (
    "{% for m in messages %}{{ m.role ~ ':' ~ m.content }}"
    "{{ '<|im_end|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
)
"""As gpt-oss: one token ends a message, another the answer."""


def folder_of(path: Path, template: str | None, generation: dict[str, Any], **tokenizer_config: Any) -> Path:
    write_folder(path, "llama3", eos_token_id=2, vocab_size=96)
    inner = Inner.from_file(str(path / "tokenizer.json"))
    assert inner.get_vocab_size() == TURN
    inner.add_special_tokens(list(SPELT.values()))
    inner.save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize(
    "template, generation, tokenizer_config, ends, end",
    [
        (None, {"eos_token_id": 0}, {}, {EOS}, EOS),
        (None, {"eos_token_id": 0}, {"eos_token": "<|im_end|>"}, {EOS, TURN}, TURN),
        (None, {"eos_token_id": 0}, {"eos_token": {"content": "<|im_end|>"}}, {EOS, TURN}, TURN),
        (None, {"eos_token_id": [0, 91]}, {"eos_token": "<absent>"}, {EOS, END}, EOS),
        (None, {}, {"eos_token": "<|im_end|>"}, {2, TURN}, TURN),
        (CHATML, {"eos_token_id": 0}, {}, {EOS, TURN}, EOS),
        (CHATML, {"eos_token_id": 0}, {"eos_token": "<|im_end|>"}, {EOS, TURN}, TURN),
        (HEADERS.replace("<|end|>", "."), {"eos_token_id": 0}, {"eos_token": "<|endoftext|>"}, {EOS}, EOS),
        (HEADERS.replace("<|end|>'", " <|end|>'"), {"eos_token_id": 0}, {}, {EOS, END}, EOS),
        (TURNS, {"eos_token_id": 0}, {}, {EOS}, EOS),
        (CLOSED, {"eos_token_id": 0}, {"eos_token": "<|endoftext|>"}, {EOS, END}, EOS),
        (RETURNS, {"eos_token_id": 0}, {}, {EOS, TURN}, EOS),
        ("{{ raise_exception('no') }}", {"eos_token_id": 0}, {}, {EOS}, EOS),
        ("<|im_end|>", {"eos_token_id": 0}, {}, {EOS}, EOS),
        ("{% for m in messages %}{{ m.content }}: {{ '<|im_end|>' }}{% endfor %}", {"eos_token_id": 0}, {}, {EOS}, EOS),
    ],
)  # fmt: skip
def test_a_chat_ends_where_its_template_ends_a_turn(
    template: str | None,
    generation: dict[str, Any],
    tokenizer_config: dict[str, Any],
    ends: set[int],
    end: int,
    tmp_path: Path,
) -> None:
    """A fine-tuned chat model whose config.json is still its base model's never stopped."""
    folder = open_folder(folder_of(tmp_path, template, generation, **tokenizer_config))
    assert folder.tokenizer.eos_ids == ends
    assert folder.end_id == end


def test_training_learns_to_end_a_turn(tmp_path: Path) -> None:
    """The end-of-turn token would be no target, or the newline behind it, which no model writes, would be one."""
    folder = open_folder(folder_of(tmp_path, CHATML, {"eos_token_id": 0}))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    (example,) = FineTuning(folder)([Document("one", json.dumps({"messages": messages}), "messages")])
    assert example.weights is not None
    learned = [token for token, weight in zip(example.ids, example.weights, strict=True) if weight]
    assert learned == [*folder.tokenizer.encode("bc"), TURN]


def test_all_answers_of_a_conversation_are_learned(tmp_path: Path) -> None:
    """With a template that leaves out earlier thoughts no conversation of several turns could be trained on."""
    folder = open_folder(folder_of(tmp_path, THOUGHTS, {"eos_token_id": 0}))
    talk = [user("a"), answer("b"), user("c"), answer("d", reasoning="e")]
    (example,) = FineTuning(folder)([Document("one", json.dumps({"messages": talk}), "messages")])
    assert example.weights is not None
    learned = [token for token, weight in zip(example.ids, example.weights, strict=True) if weight]
    said = ["b", "<think>\ne\n</think>\n\nd"]
    assert learned == [token for text in said for token in (*folder.tokenizer.encode(text), TURN)]


def test_a_template_without_a_tokenizers_token_ends_nothing() -> None:
    """What is behind an answer is text to this tokenizer."""
    assert turn_end(Tokenizer.train([], 257), ChatTemplate(CHATML)) == frozenset()
    assert turn_end(Tokenizer.train([], 257), None) == frozenset()


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, []),
        ({"add_bos_token": True, "add_eos_token": False}, []),
        ({"add_bos_token": None, "add_eos_token": "yes"}, []),
        ({"add_bos_token": False}, ["add_bos_token=false has no effect.* and puts <s> before a text"]),
        ({"add_eos_token": True}, ["add_eos_token=true has no effect.* and doesn't put </s> behind a text"]),
    ],
)
def test_flags_that_nobody_heeds_are_named(flags: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    """transformers 4 did what they say, and 5 doesn't: a model that answers otherwise gives no sign of it."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens | flags))
    warnings = unheeded_flags(tmp_path, Tokenizer(llama2()))
    assert len(warnings) == len(said)
    for warning, words in zip(warnings, said, strict=True):
        assert re.search(words, warning)


@pytest.mark.parametrize(
    "declared",
    [
        {"eos_token": "<|im_end|>"},
        {"extra_special_tokens": ["<|im_end|>"]},
        {"added_tokens_decoder": {"90": {"content": "<|im_end|>", "special": True}}},
    ],
)
def test_a_token_that_only_tokenizer_config_declares_is_one_token(declared: dict[str, Any], tmp_path: Path) -> None:
    """A chat's end of turn was written letter by letter, and printed when it was drawn, as of a mere word."""
    path = folder_of(tmp_path, CHATML, {"eos_token_id": 0}, **declared) / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < TURN]
    spec["model"]["vocab"] |= {token: index for index, token in SPELT.items()}
    path.write_text(json.dumps(spec))
    folder = open_folder(tmp_path)
    assert folder.tokenizer.encode_chat("a<|im_end|>") == [*folder.tokenizer.encode("a"), TURN]
    assert TURN not in folder.tokenizer.encode("<|im_end|>"), "in a prompt it is text"
    assert folder.tokenizer.decode([TURN]) == "" and folder.tokenizer.eos_ids == {EOS, TURN}


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": ["<s>"]},
        {"added_tokens_decoder": {"x": "<s>"}},
        {"added_tokens_decoder": {"1": 3}},
        {"extra_special_tokens": "<s>"},
        {"additional_special_tokens": [3]},
    ],
)
def test_malformed_declarations_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    """A traceback says nothing of the file."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: "):
        declared_tokens(tmp_path)
