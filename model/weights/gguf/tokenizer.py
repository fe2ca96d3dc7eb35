"""Makes a tokenizer.json from a GGUF file's metadata. It describes what llama.cpp does by the metadata, in the steps of
Hugging Face's library tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.model.text.tokenizer_file import PATTERNS
from isthmus.model.weights.gguf.metadata import Metadata

Spec = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)
"""The values of tokenizer.ggml.token_type."""
SPACES = 7
"""A value of our own for a run of spaces. The file marks it as DEFINED, and in SentencePiece it is an ordinary word."""
SPACE = "\u2581"
"""The character that SentencePiece writes for a space."""


@dataclass(frozen=True)
class Splits:
    """How a byte-level tokenizer splits text into words."""

    names: tuple[str, ...]
    """The values of tokenizer.ggml.pre that stand for this way"""
    pattern: str
    """The name of a regular expression in PATTERNS of model/text/tokenizer_file.py. "" is GPT-2's, which the library
    has built in"""
    digits: bool = False
    """Whether every digit is split off first"""
    composed: bool = False
    """Whether text is first normalized to Unicode's form NFC"""
    whole: bool = False
    """Whether a word that is a token becomes this token, whatever the merges say"""
    begin: bool = False
    """Whether the token for the beginning of a text is added, unless the file says otherwise"""


SPLITS = (
    Splits(("gpt-2", "gpt2", "phi-2", "gigachat", "a.x-4.0", "mellum", "olmo", "trillion"), ""),
    Splits(("smollm", "starcoder", "refact", "codeshell", "minerva-7b"), "", digits=True),
    Splits(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), "llama3", whole=True, begin=True),
    Splits(("dbrx", "smaug-bpe"), "llama3"),
    Splits(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), "qwen2", composed=True),
    Splits(("stablelm2", "hunyuan"), "qwen2"),
    Splits(("tekken",), "tekken", whole=True, begin=True),
    Splits(("gpt-4o",), "gpt-4o"),
)


def tokenizer_of(metadata: Metadata) -> Spec:
    """Returns the tokenizer.json. Raises ConfigError for an unknown kind of tokenizer."""
    kind = metadata.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise metadata.error("tokenizer.ggml.model", "is not supported; only 'gpt2' and 'llama' are")
    tokens = _tokens(metadata)
    found = metadata.numbers("tokenizer.ggml.token_type", len(tokens))
    types = np.full(len(tokens), NORMAL) if found is None else found.copy()
    if kind == "llama":
        _spell_spaces(tokens, types)
    spec = _byte_level(metadata, tokens) if kind == "gpt2" else _sentence_piece(metadata, tokens, types)
    begin = spec.pop("begin")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": tokens[index], **plain, "special": bool(types[index] != DEFINED)}
        for index in np.flatnonzero(np.isin(types, (CONTROL, DEFINED, UNKNOWN))).tolist()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **spec,
        "post_processor": _around(metadata, tokens, begin),
    }


def special_token(metadata: Metadata, name: str, count: int) -> int | None:
    """The id in tokenizer.ggml.NAME_token_id, or None where the file has none. Raises ConfigError for one that isn't
    below `count`."""
    found: int | None = metadata.integer(f"tokenizer.ggml.{name}_token_id", None)
    if found is not None and found >= count:
        raise metadata.error(f"tokenizer.ggml.{name}_token_id", f"must be below {count}, the number of tokens")
    return found


def _tokens(metadata: Metadata) -> list[str]:
    """The tokens, with empty and repeated ones renamed, because the library identifies tokens by their text."""
    tokens: list[str] = []
    seen: set[str] = set()
    for index, token in enumerate(metadata.texts("tokenizer.ggml.tokens")):
        name = token if token and token not in seen else f"[{token or 'EMPTY'}_{index}]"
        seen.add(name)
        tokens.append(name)
    return tokens


def _around(metadata: Metadata, tokens: list[str], begin: bool) -> Spec:
    """The post-processor that adds special tokens at the beginning and the end of a text."""
    single: list[Spec] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special: Spec = {}
    for flag, name, default, place in (
        ("tokenizer.ggml.add_bos_token", "bos", begin, 0),
        ("tokenizer.ggml.add_eos_token", "eos", False, 2),
    ):
        index = special_token(metadata, name, len(tokens))
        if metadata.flag(flag, default) and index is not None:
            single.insert(place, {"SpecialToken": {"id": tokens[index], "type_id": 0}})
            special[tokens[index]] = {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


# Byte-level BPE


def _byte_level(metadata: Metadata, tokens: list[str]) -> Spec:
    name = metadata.text("tokenizer.ggml.pre", "")
    splits = next((each for each in SPLITS if name in each.names), None)
    if splits is None:
        known = ", ".join(name for each in SPLITS for name in each.names)
        raise metadata.error(
            "tokenizer.ggml.pre", f"is not supported: how text is cut into words isn't known; only {known} are"
        )
    steps: list[Spec] = []
    if splits.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if splits.pattern:
        pattern = {"Regex": PATTERNS[splits.pattern]}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append({**level, "use_regex": not splits.pattern})
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return {
        "normalizer": {"type": "NFC"} if splits.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**level, "use_regex": True},
        "model": _bpe(vocabulary, _merges(metadata, vocabulary), ignore_merges=splits.whole),
        "begin": splits.begin,
    }


def _merges(metadata: Metadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The file's merges whose two parts and result are all tokens. The library refuses others."""
    merges = []
    for text in metadata.texts("tokenizer.ggml.merges"):
        place = text.find(" ", 1)
        left, right = text[:place], text[place + 1 :]
        if place > 0 and left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append((left, right))
    return merges


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **settings: Any) -> Spec:
    common: Spec = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    more: Spec = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **settings}
    return {"type": "BPE", **common, **more, "vocab": vocabulary, "merges": merges}


# SentencePiece


def _sentence_piece(metadata: Metadata, tokens: list[str], types: np.ndarray) -> Spec:
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = special_token(metadata, "unknown", len(tokens))
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    behind = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoded = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [decoded, {"type": "ByteFallback"}, {"type": "Fuse"}, *behind]},
        "model": _bpe(
            vocabulary,
            _scored_merges(metadata, tokens, vocabulary, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=bool((types == BYTE).any()),
        ),
        "begin": True,
    }


MAX_TOKEN = 1024
"""The most characters of a token that merges can make. The work grows with the square of its length. Published tokens
have up to 130."""
MAX_CUTTING = 1 << 26
"""The limit on the sum of the squares of the lengths of all tokens, in characters. It bounds the work and the memory
that finding merges takes. For Gemma's 262k tokens the sum is 11 million."""


def _spell_spaces(tokens: list[str], types: np.ndarray) -> None:
    """Spells runs of spaces as SentencePiece does. Converters write them as plain spaces."""
    known = set(tokens)
    for index in np.flatnonzero(types == DEFINED).tolist():
        spelt = SPACE * len(tokens[index])
        if not tokens[index].strip(" ") and spelt not in known:
            tokens[index], types[index] = spelt, SPACES


def _scored_merges(
    metadata: Metadata, tokens: list[str], vocabulary: dict[str, int], types: np.ndarray
) -> list[tuple[str, str]]:
    """The merges of SentencePiece, best first: every pair of tokens that joined make a third one, if all three can be
    parts of a text.

    A merge ranks by the score of the token that it makes. Where scores never rise from one word to the next, it ranks
    by that token's id instead, which is right even in files with wrong scores for words that were added later.
    """
    if "tokenizer.ggml.merges" in metadata:
        return _merges(metadata, vocabulary)
    words = np.flatnonzero(np.isin(types, (NORMAL, DEFINED, SPACES)))
    scores = metadata.numbers("tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise metadata.error("tokenizer.ggml.scores", "is missing, and there are no merges")
    if (np.diff(scores[types == NORMAL]) > 0).any():
        words = words[np.argsort(-scores[words].astype(np.float64), kind="stable")]
    text = {tokens[index] for index in words.tolist()}
    merges, cutting = [], 0
    for index in words.tolist():
        token = tokens[index]
        cutting += len(token) ** 2
        if len(token) > MAX_TOKEN:
            raise metadata.error(
                "tokenizer.ggml.tokens", f"has a token of {len(token)} characters; at most {MAX_TOKEN}"
            )
        if cutting > MAX_CUTTING:
            raise metadata.error(
                "tokenizer.ggml.tokens",
                f"has too many long tokens: the squares of their lengths come to more than {MAX_CUTTING:,} characters",
            )
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in text and token[cut:] in text:
                merges.append((token[:cut], token[cut:]))
    return merges
