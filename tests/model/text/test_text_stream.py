"""What a client reads, piece by piece behind its prompt, is the text of all the tokens, whatever the tokenizer."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.text.tokenizer import Tokenizer
from tests.model.text.tokenizers import KINDS, SPECIAL

TOKENIZERS = {name: Tokenizer(kind()) for name, kind in KINDS.items()}
LOST = "\ufffd"


def streamed(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], cuts: list[int] = (), *, keep_special: bool = False
) -> str:
    stream = tokenizer.stream(prompt, keep_special=keep_special)
    ends = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)} if cuts else range(len(ids) + 1))
    return "".join(stream.push(ids[start:end]) for start, end in pairwise(ends)) + stream.flush()


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids: special ones, some that no token has, and often bytes, in runs that are text and runs that are none."""
    tokenizer = TOKENIZERS[name]
    texts = st.text("ab !é漢😀\ufffd", max_size=4).map(lambda text: tokenizer.encode(text)[1:])
    anything = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=5)
    return st.lists(st.one_of(texts, anything), max_size=8).map(
        lambda parts: [token for part in parts for token in part]
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_gives_the_text_of_all_tokens(name: str) -> None:
    """An answer would lack its first space, end in an error for want of UTF-8, or depend on how fast it was read."""
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=200)
    @given(ids_of(name), st.lists(st.integers(0, 99), max_size=3), st.booleans())
    def check(ids: list[int], cuts: list[int], keep: bool) -> None:
        whole = tokenizer._inner.decode(ids, skip_special_tokens=not keep)
        assert streamed(tokenizer, [], ids, cuts, keep_special=keep) == whole
        assert streamed(tokenizer, [], ids, keep_special=keep) == whole

    check()


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_and_what_follows_it_are_one_text(name: str) -> None:
    """The prompt's last word and the answer's first would be one, or the answer's first character would be lost."""
    tokenizer = TOKENIZERS[name]
    checked = [0, 0]

    @settings(max_examples=200)
    @given(ids_of(name), ids_of(name), st.lists(st.integers(0, 99), max_size=3))
    def check(prompt: list[int], ids: list[int], cuts: list[int]) -> None:
        before, both = (tokenizer._inner.decode(part, skip_special_tokens=True) for part in (prompt, prompt + ids))
        new = streamed(tokenizer, prompt, ids, cuts)
        assert new == streamed(tokenizer, prompt, ids)
        if not both.startswith(before):
            # A character that was cut is the answer's; a valid run that the answer spoils stays as it was.
            assert LOST in both
            assert both.endswith(new) or before + new == before + tokenizer.decode(ids)
        elif before.endswith(LOST):
            assert new in {both[len(before) - lost :] for lost in range(4)}
        else:
            assert before + new == both
            checked[bool(new)] += 1

    check()
    assert checked[True] > 25


@pytest.mark.parametrize(
    "name, prompt, ids, text",
    [
        ("llama2", "a", ["▁a", "b"], " ab"),
        ("llama2", "", ["▁a", "b"], "ab"),
        ("llama2", "", ["▁", "▁", "▁a"], "  a"),
        ("metaspace", "a", ["▁a"], " a"),
        ("unigram", "a b", ["▁a", "</s>", "▁a"], " a a"),
        ("gemma", "a", ["▁a"], " a"),
        ("gemma", "", ["▁a"], " a"),
        ("wordpiece", "a", ["a", "##b", "!"], " ab!"),
        ("suffixes", "a", ["a", "b</w>", "a"], " ab a"),
        ("words", "a", ["b"], " b"),
    ],
)  # fmt: skip
def test_the_first_token_is_written_as_in_the_middle(name: str, prompt: str, ids: list[str], text: str) -> None:
    """`isthmus generate` prints prompt and text one behind the other: the space between them was lost."""
    tokenizer = TOKENIZERS[name]
    tokens = [tokenizer.token_id(token) for token in ids]
    assert streamed(tokenizer, tokenizer.encode(prompt), tokens) == text


@pytest.mark.parametrize("name", ["llama2", "gemma"])
@pytest.mark.parametrize(
    "prompt, ids, text",
    [
        (b"", b"\xe2\x82\xac", "€"),
        (b"", b"\xe2\x82\xac\x80", LOST * 4),
        (b"\xe2\x82", b"\xac", "€"),
        (b"\xe2\x82", b"", LOST * 2),
        (b"\xe2\x82", b"A", LOST * 3),
        (b"\xe2\x82\xac", b"\xe2\x82\xac", "€"),
        (b"\xe2\x82\xac\xe2", b"\x82\xac", "€"),
        (b"\xe2\x82\xac", b"\x80", LOST),
        (b"\x80", b"\xe2\x82\xac", LOST * 3),
    ],
)
def test_bytes_are_a_character_when_they_are_whole(name: str, prompt: bytes, ids: bytes, text: str) -> None:
    """A prompt that ends in half a character: the other half came out as U+FFFD, or ended the call."""
    tokenizer = TOKENIZERS[name]
    spelt = [[tokenizer.token_id(f"<0x{byte:02X}>") for byte in part] for part in (prompt, ids)]
    assert streamed(tokenizer, *spelt) == text
    end = [tokenizer.token_id("!")]
    assert streamed(tokenizer, spelt[0], spelt[1] + end) == (text + "!")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_byte_level_prompt_may_end_in_half_a_character(cut: int) -> None:
    """As above, with the tokenizers of most models."""
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.token_id(character) for character in "aðŁĺĢ"]
    assert streamed(tokenizer, ids[: 1 + cut], ids[1 + cut :]) == "😀"
    assert streamed(tokenizer, ids[: 1 + cut], []) == LOST
    assert streamed(tokenizer, ids, ids) == "a😀"


def test_text_comes_as_soon_as_it_is_sure() -> None:
    """A stream that holds words back reads as a model that hangs."""
    for name, tokenizer in TOKENIZERS.items():
        if name in ("speech", "wordpiece", "words", "suffixes"):
            continue
        stream = tokenizer.stream(tokenizer.encode("a"))
        for token in tokenizer.encode("ab é漢 ab")[2:]:
            assert stream.push([token]), name


def test_a_long_text_takes_time_as_its_length() -> None:
    """Every token would be decoded together with all before it: 4,000 tokens took minutes."""
    tokenizer = TOKENIZERS["llama2"]
    decoded = 0
    stream = tokenizer.stream(tokenizer.encode("a " * 1000))
    decode = stream._decode

    def counting(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    stream._decode = counting
    ids = tokenizer.encode("ab é漢😀 ") * 300 + tokenizer.encode("😀" * 300)
    assert "".join(stream.push([token]) for token in ids)
    assert decoded < 20 * len(ids)


def test_special_tokens_are_no_text() -> None:
    """The end-of-turn token would be printed, or cut a character in two."""
    for tokenizer in TOKENIZERS.values():
        ids = [tokenizer.token_id(token) for token in SPECIAL]
        assert streamed(tokenizer, ids, ids) == ""
    tokenizer = TOKENIZERS["gemma"]
    first, *rest = (tokenizer.token_id(f"<0x{byte:02X}>") for byte in "€".encode())
    assert streamed(tokenizer, [], [first, tokenizer.token_id("</s>"), *rest]) == "€"
