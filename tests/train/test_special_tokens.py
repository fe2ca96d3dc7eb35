"""Special tokens that are spelt out in the text to train on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import Sequence

from isthmus.errors import ConfigError
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer
from isthmus.model.weights.folder import open_folder
from isthmus.train.config import DataConfig
from isthmus.train.data import prepare
from isthmus.train.documents import Document
from isthmus.train.examples import FineTuning, Pretraining
from tests.train.chat_model import END, START, write_chat_model

TEXT = f"{START}user\nhi{END}\nyes"


def test_a_text_with_a_conversation_in_it_is_learned_as_one_when_asked_for(tmp_path: Path) -> None:
    """A file of conversations written out would teach to spell the marks letter by letter."""
    folder = open_folder(write_chat_model(tmp_path / "model"))
    tokenizer, document = folder.tokenizer, Document("a", TEXT)
    (special,) = FineTuning(folder, parse_special=True)([document])
    (plain,) = FineTuning(folder)([document])
    start, end = (tokenizer.token_id(token) for token in (START, END))
    assert special.ids == [start, *tokenizer.encode("user\nhi"), end, *tokenizer.encode("\nyes"), end]
    assert plain.ids == [*tokenizer.encode(TEXT), end] and plain.ids.count(start) == 0
    base = Tokenizer.train(["a b"], 300)
    two = Document("b", f"a{END_OF_TEXT}b")
    counts = [Pretraining(base, parse_special)([two])[0].ids.count(base.eos_id or 0) for parse_special in (False, True)]
    assert counts == [1, 2]


def test_text_that_spells_special_tokens_is_pointed_out_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model would learn garbage without a word; a warning a document would hide all others."""
    folder = open_folder(write_chat_model(tmp_path / "model"))
    documents = [Document("page", "</p> <|other|>"), Document("first", TEXT), Document("second", TEXT)]
    for parse_special, names in ((False, ["first"]), (True, [])):
        with caplog.at_level(logging.WARNING):
            encode = FineTuning(folder, parse_special=parse_special)
            encode(documents)
            encode(documents)
        said = [record.getMessage() for record in caplog.records]
        assert [message.split()[1] for message in said] == names
        assert all(START in message and "--text.parse-special" in message for message in said)
        caplog.clear()


def test_data_is_prepared_anew_when_special_tokens_become_special(tmp_path: Path) -> None:
    """Tokens of another setting would be trained on."""
    folder = open_folder(write_chat_model(tmp_path / "model"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(40):
        (texts / f"{index}.txt").write_text(TEXT)
    sizes = []
    for parse_special in (False, True, False):
        config = DataConfig(heldout_fraction=0.2, seq=16, parse_special=parse_special)
        data, _ = prepare([str(texts)], config, tmp_path / "out", 0, start=folder)
        sizes.append(len(data.train.tokens))
    assert sizes[1] < sizes[0] == sizes[2]


def test_an_end_that_a_text_begins_with_is_not_its_own(tmp_path: Path) -> None:
    """Two documents would run into one another, and nothing teach where the first ends."""
    inner = Tokenizer.train(["a b"], 300)._inner
    inner.post_processor = Sequence([])
    tokenizer = Tokenizer(inner)
    texts = [f"{END_OF_TEXT}a", "b", f"a{END_OF_TEXT}"]
    ids = [example.ids for example in Pretraining(tokenizer, True)([Document(text, text) for text in texts])]
    assert [row[-1] for row in ids] == [tokenizer.eos_id] * 3
    assert [row.count(tokenizer.eos_id) for row in ids] == [2, 1, 1]


def test_data_is_prepared_anew_when_a_word_becomes_a_token(tmp_path: Path) -> None:
    """tokenizer_config.json may declare tokens: it isn't in tokenizer.json that a folder's tokens changed."""
    folder = write_chat_model(tmp_path / "model")
    before = FineTuning(open_folder(folder)).stamp
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": ["a"]}))
    after = FineTuning(open_folder(folder)).stamp
    assert before != after and FineTuning(open_folder(folder)).stamp == after


def test_a_text_that_the_tokenizer_gives_up_on_is_named(tmp_path: Path) -> None:
    """A regular expression may give up on one text of thousands: a panic of a library names none."""
    folder = open_folder(write_chat_model(tmp_path / "model"))
    for inner in (folder.tokenizer._inner, folder.tokenizer._with_special_tokens):
        inner.pre_tokenizer = Split(Regex("(?:q|qw|w)+!z"), "isolated")
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qw" * 100}]})
    for document in (Document("a.txt", "qw" * 100), Document("b.jsonl:2", chat, "messages")):
        with pytest.raises(ConfigError, match=f"data: a document from {document.name}.*gives up"):
            FineTuning(folder)([document])
