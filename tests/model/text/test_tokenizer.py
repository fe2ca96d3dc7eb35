"""No text is lost between a string, its tokens, and the stream that gives them out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import ConfigError
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer

TEXT = "The quick brown fox, the lazy dog. Größe, naïve, 漢字かな交じり文, русский, עברית, 😀👩‍👩‍👧 e\u0301\n\t  "
TOKENIZER = Tokenizer.train([TEXT] * 20, 400)
BYTES_ONLY = Tokenizer.train([], 257)
"""A token a byte: every character beyond ASCII is split over several."""

TEXTS = st.one_of(st.text(), st.text(alphabet="aé漢😀\u0301\ufffd \n\0<|endoftext|>"), st.just(END_OF_TEXT))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    """What a stream gives for one token after the other, and at the end."""
    stream = tokenizer.stream()
    given = [stream.push([token]) for token in ids]
    return given, stream.flush()


@given(TEXTS)
def test_any_text_survives(text: str) -> None:
    """A prompt must reach the model as it was typed, whatever language it is in."""
    for tokenizer in (TOKENIZER, BYTES_ONLY):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(st.lists(TEXTS, max_size=5))
def test_a_batch_is_its_texts_one_by_one(texts: list[str]) -> None:
    """Training reads in batches and serving one by one: they must see the same tokens."""
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


@given(TEXTS)
def test_a_stream_gives_whole_characters_and_all_of_them(text: str) -> None:
    """A client that prints each piece as it comes must see the text, without � where a character was cut."""
    for tokenizer in (TOKENIZER, BYTES_ONLY):
        given, rest = pieces(tokenizer, tokenizer.encode(text))
        assert "".join(given) + rest == text
        if "\ufffd" not in text:
            assert rest == ""
            assert not any("\ufffd" in piece for piece in given)


@given(st.lists(st.integers(0, BYTES_ONLY.vocab_size - 1), max_size=30))
def test_a_stream_of_any_tokens_is_their_text(ids: list[int]) -> None:
    """A model may draw bytes that are no UTF-8; the streamed answer must still be the whole answer."""
    given, rest = pieces(BYTES_ONLY, ids)
    assert "".join(given) + rest == BYTES_ONLY.decode(ids)


@given(TEXTS, st.integers(1, 7))
def test_pushing_several_tokens_at_once_changes_nothing(text: str, size: int) -> None:
    """How many tokens a step brings must not change the text."""
    ids = BYTES_ONLY.encode(text)
    stream = BYTES_ONLY.stream()
    whole = "".join(stream.push(ids[i : i + size]) for i in range(0, len(ids), size)) + stream.flush()
    assert whole == text


def test_an_unfinished_character_is_held_back_until_the_end() -> None:
    """max_tokens may cut a character in two: its bytes must come out once, as �, and not be lost."""
    stream = BYTES_ONLY.stream()
    ids = BYTES_ONLY.encode("a漢")
    assert stream.push(ids[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_every_prompt_starts_a_text() -> None:
    """Training starts each document with it; a prompt without it would be a text from the middle."""
    assert TOKENIZER.encode("fox")[0] == TOKENIZER.eos_id
    assert TOKENIZER.encode("") == [TOKENIZER.eos_id]


def test_a_special_token_that_is_typed_is_text() -> None:
    """A user who types <|endoftext|> must not be able to end the text and begin another."""
    ids = TOKENIZER.encode(f"a{END_OF_TEXT}b")
    assert ids.count(TOKENIZER.eos_id) == 1
    assert TOKENIZER.encode_batch([f"a{END_OF_TEXT}b"]) == [ids]
    assert TOKENIZER.decode(ids) == f"a{END_OF_TEXT}b"
    assert TOKENIZER.decode([TOKENIZER.eos_id]) == ""


def test_it_travels_with_the_model(tmp_path: Path) -> None:
    """The server reads the file that training wrote: it must be the same tokenizer, special tokens included."""
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = f"{TEXT}{END_OF_TEXT}"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert (loaded.vocab_size, loaded.eos_id) == (TOKENIZER.vocab_size, TOKENIZER.eos_id)
    assert loaded.decode(loaded.encode(text)) == text


def test_merges_shorten_text() -> None:
    """A tokenizer that learned nothing would make every sequence four times as long."""
    assert len(TOKENIZER.encode("The quick brown fox")) < len(BYTES_ONLY.encode("The quick brown fox")) / 2


def test_training_is_deterministic() -> None:
    """Resuming reads the data again: another tokenizer would make it another text."""
    again = Tokenizer.train([TEXT] * 20, 400)
    assert again.encode(TEXT) == TOKENIZER.encode(TEXT)


def test_wrong_tokenizers_are_refused(tmp_path: Path) -> None:
    """Each of these would otherwise be a stack trace from a library."""
    with pytest.raises(ConfigError, match="257"):
        Tokenizer.train([TEXT], 256)
    with pytest.raises(ConfigError, match="absent"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match="broken"):
        Tokenizer.load(tmp_path / "broken.json")
