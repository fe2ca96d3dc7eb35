"""Converts a tokenizer.json to the metadata of a GGUF file, which is the inverse of model/weights/gguf/tokenizer.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.text.tokenizer_file import PATTERNS
from isthmus.model.weights.gguf.tokenizer import BYTE, CONTROL, DEFINED, NORMAL, SPACE, SPLITS, UNKNOWN, UNUSED, Splits

Spec = Mapping[str, Any]


def tokenizer_metadata(
    spec: Spec, special: Mapping[str, str], ends: list[int], around: list[int], vocab_size: int
) -> dict[str, Any]:
    """Returns the metadata of a GGUF file that describes a tokenizer.

    spec: the tokenizer.json. special: the special tokens, such as {"eos_token": "</s>"}. ends: the ids that end a text,
    the main one first. around: the ids that the tokenizer gives for an empty text. vocab_size: the number of ids of the
    model.

    Raises ConfigError for a tokenizer that llama.cpp has no kind for, or that splits text as none of its kinds does.
    """
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"gguf: tokenizers of the kind {model.get('type')} are not written; only BPE")
    tokens, types = _vocabulary(spec, vocab_size)
    ids = {token: index for index, token in enumerate(tokens)}
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if any(step.get("type") == "ByteLevel" for step in _steps(spec.get("pre_tokenizer"), "pretokenizers")):
        found |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _splits(spec).names[0]}
        found |= {"tokenizer.ggml.merges": merges or [f"{tokens[0]} {tokens[0]}"]}
    else:
        found |= _sentence_piece(spec, tokens, types)
    found["tokenizer.ggml.token_type"] = types
    for name, key in (("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if special.get(name) in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[special[name]]
    begin = around[:1]
    if begin:
        found["tokenizer.ggml.bos_token_id"] = begin[0]
    found["tokenizer.ggml.add_bos_token"] = bool(begin)
    for key, end in zip(("eos", "eot", "eom"), ends, strict=False):
        found[f"tokenizer.ggml.{key}_token_id"] = end
    return found


def _vocabulary(spec: Spec, vocab_size: int) -> tuple[list[str], list[int]]:
    """Returns the tokens and their types, as many as the model has ids. An id without a token gets one of type
    UNUSED."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    fallback, unknown = spec["model"].get("byte_fallback"), spec["model"].get("unk_token")
    for token, index in spec["model"]["vocab"].items():
        if index < vocab_size:
            byte = fallback and len(token) == 6 and token.startswith("<0x")
            tokens[index], types[index] = token, BYTE if byte else UNKNOWN if token == unknown else NORMAL
    for added in spec["added_tokens"]:
        if added["id"] < vocab_size and types[added["id"]] != UNKNOWN:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else DEFINED
    return tokens, types


def _steps(part: Any, name: str) -> Iterator[Spec]:
    if isinstance(part, dict):
        yield from part[name] if part.get("type") == "Sequence" else [part]


def _splits(spec: Spec) -> Splits:
    """The way in SPLITS that splits text as this tokenizer does."""
    patterns, digits = [], False
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        kind = step.get("type")
        if kind == "Split" and "Regex" in step.get("pattern", {}):
            patterns.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            digits = True
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [""] if step.get("use_regex", True) else []
        else:
            raise ConfigError(f"gguf: llama.cpp has no pre-tokenizer of the kind {kind} as this tokenizer has it")
    composed = any(step.get("type") == "NFC" for step in _steps(spec.get("normalizer"), "normalizers"))
    whole = bool(spec["model"].get("ignore_merges"))
    for splits in SPLITS:
        same = patterns == [PATTERNS[splits.pattern] if splits.pattern else ""] and digits == splits.digits
        if same and composed == splits.composed and whole == splits.whole:
            return splits
    raise ConfigError("gguf: llama.cpp has no pre-tokenizer that cuts text as this tokenizer does")


def _sentence_piece(spec: Spec, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Returns the metadata of a SentencePiece tokenizer. The score of a token is minus the rank of the merge that makes
    it. Runs of spaces in `tokens`, and their `types`, are changed in place."""
    spaces = [step for step in _steps(spec.get("normalizer"), "normalizers") if step.get("type") == "Replace"]
    before = [*_steps(spec.get("pre_tokenizer"), "pretokenizers"), *_steps(spec.get("normalizer"), "normalizers")]
    metaspace = [step for step in before if step.get("type") == "Metaspace"]
    known = {"Replace", "Prepend", "Metaspace", "Split"}
    if not (spaces or metaspace) or {step.get("type") for step in before} - known:
        raise ConfigError("gguf: llama.cpp has no tokenizer that treats spaces as this one does")
    prefix = any(step.get("type") == "Prepend" for step in before)
    prefix |= any(step.get("prepend_scheme", "always") != "never" for step in metaspace)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(spec["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for index, token in enumerate(tokens):
        if types[index] == NORMAL and len(token) > 1 and not token.strip(SPACE):
            tokens[index], types[index] = " " * len(token), DEFINED  # as llama.cpp's own converter has them
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
