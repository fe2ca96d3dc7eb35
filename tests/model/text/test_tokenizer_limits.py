"""What a text can be told by its length, and what encoding leaves to other threads."""

from __future__ import annotations

import inspect
import typing
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers

from isthmus.model.text.tokenizer import Tokenizer, TooManyTokens

TEXT = inspect.getsource(typing)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer.train([TEXT], 400)


def byte_fallback(normalizer: normalizers.Normalizer | None) -> Tokenizer:
    """Like Llama 2's or Gemma's: characters, bytes for those that it doesn't have, and one long token."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefgh ▁é中", "aa", "aaaa"]
    vocab = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocab, [("a", "a"), ("aa", "aa")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    inner = Inner(model)
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(inner)


TOKENIZERS = {
    "byte level": lambda: Tokenizer.train([TEXT], 400),
    "byte fallback": lambda: byte_fallback(normalizers.Replace(" ", "▁")),
    "NFC": lambda: byte_fallback(normalizers.NFC()),
    "NFKC": lambda: byte_fallback(normalizers.NFKC()),
    "NFD": lambda: byte_fallback(normalizers.NFD()),
}
COMPOSED = [chr(point) for point in range(0x250, 0x2000) if len(unicodedata.normalize("NFD", chr(point))) > 1]
PIECES = st.one_of(
    st.text(max_size=8),
    st.text("a ▁", max_size=20),
    st.sampled_from(COMPOSED).map(lambda c: unicodedata.normalize("NFD", c)),
    st.sampled_from(["\u1100\u1161\u11a8", "\u03b1\u0313\u0300\u0345", "ﷺ", "\uff46\uff55\uff4c\uff4c", "\U0001d400"]),
)


@pytest.mark.parametrize("build", TOKENIZERS.values(), ids=TOKENIZERS)
def test_no_text_that_fits_is_refused_by_its_length(build: typing.Callable[[], Tokenizer]) -> None:
    """The bound is used before anything is encoded: were it too low, good prompts would be refused."""
    tokenizer = build()

    @settings(max_examples=200, deadline=None)
    @given(st.lists(PIECES, max_size=12).map("".join))
    def fits(text: str) -> None:
        assert len(text) <= tokenizer.most_characters(len(tokenizer.encode(text)))

    fits()


def test_the_bound_is_what_the_longest_token_spells() -> None:
    """Were it higher, texts that can't fit would be encoded for nothing."""
    tokenizer = byte_fallback(None)
    longest = max(map(len, tokenizer._inner.get_vocab()))
    assert tokenizer.most_characters(7) == 7 * longest
    assert len(tokenizer.encode("aaaa" * 7)) == 7


@pytest.mark.parametrize("text", ["", "a", TEXT[:5000], "naïve 😀 中文\n\t\x00", "<|endoftext|> spelled out"])
def test_ids_are_those_of_a_plain_encoding(byte_level: Tokenizer, text: str) -> None:
    """The library's plain call gives them too, and holds the interpreter meanwhile."""
    inner = Inner.from_str(byte_level._inner.to_str())
    inner.encode_special_tokens = True
    assert byte_level.encode(text) == inner.encode(text).ids
    inner.encode_special_tokens = False
    assert byte_level.encode_chat(text) == inner.encode(text, add_special_tokens=False).ids


def test_too_many_tokens_are_counted_and_not_made_a_list(byte_level: Tokenizer) -> None:
    for encode in (byte_level.encode, byte_level.encode_chat):
        ids = encode(TEXT[:3000])
        assert encode(TEXT[:3000], len(ids)) == ids
        with pytest.raises(TooManyTokens) as error:
            encode(TEXT[:3000], len(ids) - 1)
        assert error.value.count == len(ids)


@pytest.mark.parametrize("build", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_long_text_is_refused_for_its_tokens_alone(
    build: typing.Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted in parts, because a token takes some 250 bytes until it is an id: 4 MB made a gigabyte. What fits
    is taken to the last token, and encoded whole."""
    tokenizer = build()
    text = TEXT[:6000]
    ids = tokenizer.encode(text)
    monkeypatch.setattr("isthmus.model.text.tokenizer.PART", 1000)
    assert tokenizer.encode(text, len(ids)) == ids
    with pytest.raises(TooManyTokens, match=f"has {len(ids)} tokens"):
        tokenizer.encode(text, len(ids) - 1)
    with pytest.raises(TooManyTokens, match="has at least") as error:
        tokenizer.encode(text, len(ids) // 4)
    assert len(ids) // 4 < error.value.count <= len(ids)


@pytest.mark.parametrize("build", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_text_is_no_longer_than_its_tokens_spell(build: typing.Callable[[], Tokenizer]) -> None:
    """The answer's size is bounded before it is made."""
    tokenizer, rng = build(), np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, tokenizer.vocab_size, rng.integers(1, 30))
        assert len(tokenizer.decode(ids.tolist())) <= tokenizer.spelt_characters(ids)
