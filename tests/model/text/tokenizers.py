"""Small tokenizers of each kind that models are published with."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("<unk>", "<s>", "</s>", "<|turn|>")
_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
_PIECES = ["▁", "▁▁", "a", "b", "▁a", "▁ab", "é", "▁漢", "\ufffd", "!"]
_MERGES = [("▁", "▁"), ("▁", "a"), ("▁a", "b"), ("▁", "漢")]


def _vocabulary(*pieces: str) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys((*SPECIAL, *pieces)))}


def _with_special(inner: Tokenizer) -> Tokenizer:
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    inner.add_tokens([AddedToken("<tool é>", normalized=False)])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return inner


def _sentencepiece() -> Tokenizer:
    vocabulary = _vocabulary(*_BYTES, *_PIECES, "漢")
    return Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def llama2() -> Tokenizer:
    """A space before every text, which decoding strips; what isn't in the vocabulary becomes bytes."""
    inner = _sentencepiece()
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special(inner)


def gemma() -> Tokenizer:
    inner = _sentencepiece()
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_special(inner)


def metaspace() -> Tokenizer:
    """As Mistral's older ones; and as T5's, but for the vocabulary."""
    inner = _sentencepiece()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    return _with_special(inner)


def unigram() -> Tokenizer:
    pieces = [*SPECIAL, *_PIECES, "漢"]
    inner = Tokenizer(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=0))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return _with_special(inner)


def byte_level() -> Tokenizer:
    """As GPT-2's, Llama 3's and Qwen's: a token a byte, and some of several, of halves of characters too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("æ", "¼"), ("æ¼", "¢"), ("Ã", "©"), ("ð", "Ł"), ("ĺ", "Ģ")]
    vocabulary = _vocabulary(*alphabet, *(left + right for left, right in merges))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _with_special(inner)


def stripped_bytes() -> Tokenizer:
    """Of no family: bytes, and then something else."""
    inner = byte_level()
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return inner


def wordpiece() -> Tokenizer:
    inner = Tokenizer(models.WordPiece(_vocabulary("a", "##a", "##b", "b", "!", "'", "n't", "é"), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return _with_special(inner)


def suffixes() -> Tokenizer:
    """As CLIP's: a word's last token says so."""
    inner = Tokenizer(models.BPE(_vocabulary("a", "b", "a</w>", "b</w>", "é</w>"), [], end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.BPEDecoder()
    return _with_special(inner)


def speech() -> Tokenizer:
    """CTC: what is drawn twice in a row counts once."""
    inner = Tokenizer(models.WordLevel(_vocabulary("<pad>", "|", "a", "b"), unk_token="<unk>"))
    inner.decoder = decoders.CTC(pad_token="<pad>")
    return _with_special(inner)


def words() -> Tokenizer:
    """Without a decoder: a space between any two tokens."""
    inner = Tokenizer(models.WordLevel(_vocabulary("a", "b", "é"), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_special(inner)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    kind.__name__: kind
    for kind in (
        llama2, gemma, metaspace, unigram, byte_level, stripped_bytes, wordpiece, suffixes, speech, words,
    )
}  # fmt: skip
