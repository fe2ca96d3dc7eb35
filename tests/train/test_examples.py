"""Of a conversation the assistant's words are learnt, of a text all of it, and nothing of what lies between them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors

from isthmus.errors import ConfigError
from isthmus.model.config import ModelConfig
from isthmus.model.text.chat import ChatTemplate
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import GenerationDefaults, ModelFolder
from isthmus.train.config import DataConfig
from isthmus.train.data import TokenFile, prepare
from isthmus.train.documents import Document
from isthmus.train.examples import FineTuning
from tests.train.chat_model import CHAT_ML, END, START

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ġ", "Ġ"), ("o", "k"), ("Ċ", "Ċ")]
SPECIAL = ["<s>", "</s>", START, END]


def byte_level(*, trim: bool = True) -> Tokenizer:
    """Byte-level BPE as Llama 3 has it: offsets without the space in front of a word, and <s> before a text."""
    tokens = [*BYTES, *("".join(pair) for pair in MERGES), *SPECIAL]
    vocab = {token: index for index, token in enumerate(tokens)}
    inner = Inner(models.BPE(vocab=vocab, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), start])
    inner.add_special_tokens(SPECIAL)
    tokenizer = Tokenizer(inner)
    tokenizer.eos_ids = frozenset({vocab["</s>"], vocab[END]})
    return tokenizer


def folder_of(path: Path, tokenizer: Tokenizer, *, chat: bool = True, vocab_size: int = 512) -> ModelFolder:
    path.mkdir(exist_ok=True)
    tokenizer.save(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    template = ChatTemplate(CHAT_ML) if chat else None
    return ModelFolder(path, ModelConfig(vocab_size=vocab_size), tokenizer, template, GenerationDefaults(), None)


def conversation(*turns: tuple[str, str], name: str = "c.jsonl:1") -> Document:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Document(name, json.dumps({"messages": messages}), "messages")


def text_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token of the byte-level tokenizer stands for."""
    spelt = tokenizer._inner.id_to_token(token)
    plain = [byte for byte in range(256) if chr(byte) in BYTES]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
    return spelt.encode() if spelt in SPECIAL else bytes(table[character] for character in spelt)


TALK = conversation(
    ("system", "be brief, größer"),
    ("user", "say  hello"),
    ("assistant", " hello  hello 😀é"),
    ("user", "assistant\nno, more"),
    ("assistant", "\n\nok"),
)


@pytest.mark.parametrize("trim", [True, False], ids=["trimmed", "whole"])
def test_the_assistants_tokens_count_and_no_others(trim: bool, tmp_path: Path) -> None:
    """Learning the questions teaches a model to ask them; not learning the end of turn, never to stop."""
    tokenizer = byte_level(trim=trim)
    folder = folder_of(tmp_path, tokenizer)
    (example,) = FineTuning(folder)([TALK])
    assert folder.chat is not None and example.weights is not None
    whole = folder.chat.render(json.loads(TALK.text)["messages"], add_generation_prompt=False).encode()
    said = re.compile(rb"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
    answers = [match.span(1) for match in said.finditer(whole)]
    assert len(answers) == 2
    at = 0
    for token, weight in zip(example.ids, example.weights, strict=True):
        piece = text_of(tokenizer, token)
        assert whole[at : at + len(piece)] == piece
        inside = any(start < at + len(piece) and at < end for start, end in answers)
        assert weight == inside, (at, piece)
        at += len(piece)
    assert at == len(whole), "nothing is put before a rendered conversation"
    learnt = [text_of(tokenizer, t) for t, w in zip(example.ids, example.weights, strict=True) if w]
    # One token is the last newline of the header and the answer's first: to begin the answer is to draw it.
    assert b"".join(learnt).decode() == f" hello  hello 😀é{END}\n\n\nok{END}"


def test_a_text_begins_and_ends_as_the_model_knows_it(tmp_path: Path) -> None:
    """All of a text is learnt, and where it ends; special tokens spelt out in it are text."""
    tokenizer = byte_level()
    encode = FineTuning(folder_of(tmp_path, tokenizer))
    (example,) = encode([Document("a.txt", f"hello {END}")])
    start, end = (tokenizer.token_id(token) for token in ("<s>", "</s>"))
    assert example.ids == [start, *tokenizer.encode(f"hello {END}")[1:], end]
    assert example.ids.count(start) == example.ids.count(end) == 1 and tokenizer.token_id(END) not in example.ids
    assert example.weights is not None and example.weights.tolist() == [0] + [1] * (len(example.ids) - 1)


@pytest.mark.parametrize(
    ("around", "want"),
    [(None, "A/B/"), ("$A </s>", "A/B/"), ("<s> $A", "<A/<B/"), ("<s> $A </s>", "<A/<B/"), ("</s> $A", "/A//B/")],
)
def test_texts_end_once_whatever_the_tokenizer_adds(around: str | None, want: str, tmp_path: Path) -> None:
    """GPT-2's and Qwen's tokenizers add nothing: without an end a text runs into the next, and nothing teaches a model
    to stop. No text's first token is learnt, so an end in front of a text isn't learnt after the one behind another."""
    tokenizer = byte_level()
    start, end = (tokenizer.token_id(token) for token in ("<s>", "</s>"))
    tokenizer._inner.post_processor = (
        processors.TemplateProcessing(single=around, special_tokens=[("<s>", start), ("</s>", end)])
        if around
        else processors.ByteLevel()
    )
    texts = {"A": "hello", "B": "ok"}
    examples = FineTuning(folder_of(tmp_path, tokenizer))([Document(name, text) for name, text in texts.items()])
    pieces = {name: tokenizer.encode_chat(text) for name, text in texts.items()} | {"<": [start], "/": [end]}
    assert [token for example in examples for token in example.ids] == [t for name in want for t in pieces[name]]
    for example in examples:
        assert example.weights is not None and example.weights.tolist() == [0] + [1] * (len(example.ids) - 1)


def test_texts_and_conversations_keep_their_order(tmp_path: Path) -> None:
    """A file may mix them; resuming needs them where they were."""
    encode = FineTuning(folder_of(tmp_path, byte_level()))
    mixed = [Document("1", "one"), TALK, Document("2", "two"), conversation(("user", "a"), ("assistant", "b"))]
    for document, example in zip(mixed, encode(mixed), strict=True):
        (alone,) = encode([document])
        assert example.ids == alone.ids
        np.testing.assert_array_equal(example.weights, alone.weights)


# windows


@pytest.mark.parametrize("seq", [5, 16, 400])
def test_windows_count_what_is_learnt(seq: int, tmp_path: Path) -> None:
    """Against a plain loop: a weight that moved by one teaches the token beside the answer."""
    encode = FineTuning(folder_of(tmp_path / "model", byte_level()))
    documents = [Document("1", "hello ok"), TALK, Document("2", "two"), conversation(("user", "a"), ("assistant", "b"))]
    split = TokenFile.write(tmp_path / "split", documents, encode, lambda size: None)
    flat: list[tuple[int, int, int, int]] = []
    for number, example in enumerate(encode(documents)):
        assert example.weights is not None
        for position, (token, weight) in enumerate(zip(example.ids, example.weights, strict=True)):
            flat.append((token, int(weight), number, position))
    assert split.targets == sum(weight for _, weight, _, _ in flat)
    starts = np.array([0, 3, len(flat) // 2, len(flat) - 2])
    batch = split.batch(starts, seq)
    for row, start in enumerate(starts.tolist()):
        for column in range(seq):
            at = start + column
            want = flat[at + 1][1] if at + 1 < len(flat) else 0
            assert batch.weights[row, column] == want
            if at < len(flat):
                token, _, number, position = flat[at]
                begin = min(position, column)
                assert batch.tokens[row, column] == token
                assert batch.segments[row, column] == number - flat[start][2]
                assert batch.positions[row, column] == begin
            if want:
                assert batch.targets[row, column] == flat[at + 1][0]
                assert flat[at + 1][2] == flat[at][2], "one document's beginning was learnt from another's end"


def test_weights_survive_on_disk(tmp_path: Path) -> None:
    """A resumed run must learn the same tokens."""
    encode = FineTuning(folder_of(tmp_path / "model", byte_level()))
    written = TokenFile.write(tmp_path / "split", [TALK], encode, lambda size: None)
    read = TokenFile.open(tmp_path / "split")
    assert read.targets == written.targets > 0 and read.conversations == 1
    for ours, theirs in zip(written.batch(np.array([0, 7]), 9), read.batch(np.array([0, 7]), 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# what can't work


def lines(path: Path, *objects: Any) -> tuple[str]:
    path.write_text("".join(json.dumps(line) + "\n" for line in objects))
    return (str(path),)


ASKED = {"messages": [{"role": "user", "content": "hello"}]}
ANSWERED = {"messages": [*ASKED["messages"], {"role": "assistant", "content": "ok"}]}
ANOTHER = {"messages": [*ASKED["messages"], {"role": "assistant", "content": "hello"}]}


def test_messages_need_a_model_that_has_a_template(tmp_path: Path) -> None:
    """Else there is no knowing how the model wants to be spoken to."""
    data = lines(tmp_path / "c.jsonl", {"text": "hello"}, ANSWERED)
    with pytest.raises(ConfigError, match=r"c\.jsonl:2 holds messages: they need --init"):
        prepare(data, DataConfig(vocab_size=300), tmp_path / "run", 0)
    start = folder_of(tmp_path / "model", byte_level(), chat=False)
    with pytest.raises(ConfigError, match=r"c\.jsonl:2 holds messages, and .*model has no chat template"):
        prepare(data, DataConfig(), tmp_path / "run", 0, start=start)


def test_nothing_to_learn_is_said(tmp_path: Path) -> None:
    """Hours of steps with a loss of 0 would follow."""
    start = folder_of(tmp_path / "model", byte_level())
    with pytest.raises(ConfigError, match="nothing to learn"):
        prepare(
            lines(tmp_path / "c.jsonl", ASKED, {"messages": ASKED["messages"] * 2}),
            DataConfig(),
            tmp_path / "run",
            0,
            start=start,
        )


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    start = folder_of(tmp_path / "model", byte_level())
    answer_first = {"messages": [{"role": "assistant", "content": "ok"}]}
    with pytest.raises(ConfigError, match=r"c\.jsonl:2: messages\[0\] is the assistant's"):
        prepare(lines(tmp_path / "c.jsonl", ANSWERED, answer_first), DataConfig(), tmp_path / "run", 0, start=start)


def test_a_token_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    """Some tokenizers have more ids than their model: an embedding gathered past its end is silent nonsense."""
    tokenizer = byte_level()
    size = tokenizer.vocab_size
    start = folder_of(tmp_path / "model", tokenizer, vocab_size=size - 1)  # all but <|im_end|>
    texts = lines(tmp_path / "t.jsonl", {"text": "hello"}, {"text": "ok"})
    assert prepare(texts, DataConfig(), tmp_path / "run", 0, start=start)[0].train.targets > 0
    with pytest.raises(ConfigError, match=rf"c\.jsonl:\d holds token {size - 1}, .* only {size - 1} ids"):
        prepare(lines(tmp_path / "c.jsonl", ANSWERED, ANOTHER), DataConfig(), tmp_path / "run", 0, start=start)


def test_another_template_or_tokenizer_is_other_data(tmp_path: Path) -> None:
    """Tokens of yesterday's template must not be trained on with today's."""
    data = lines(tmp_path / "c.jsonl", ANSWERED, ANSWERED, {"text": "hello"})
    start = folder_of(tmp_path / "model", byte_level())
    ticks: list[str] = []

    def run(start: ModelFolder) -> None:
        ticks.clear()
        prepare(data, DataConfig(), tmp_path / "run", 0, lambda stage, _: ticks.append(stage), start=start)

    run(start)
    assert ticks
    run(start)
    assert not ticks
    run(folder_of(tmp_path / "model", byte_level(trim=False)))
    assert ticks
    other = ChatTemplate(f"ok {CHAT_ML}")
    run(ModelFolder(start.path, start.config, start.tokenizer, other, start.generation, None))
    assert ticks
