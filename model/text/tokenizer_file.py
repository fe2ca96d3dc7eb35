"""Checks a tokenizer.json, which is somebody else's program: bounds what it may make of a text before it runs."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import ConfigError
from isthmus.model.process.files import MAX_TOKENIZER_BYTES, read_json, shortened
from isthmus.model.text import tokenizer_trial
from isthmus.model.text.tokenizer_trial import GAVE_UP

MAX_GROWTH = 256
"""Most bytes that normalizers, or decoders, may make of one byte; those of published families make up to 132"""
MAX_TOKEN = 1 << 16
"""Most characters of a token"""
MAX_ADDED = 64
"""Most tokens that a post-processor may put around a text"""
TRIAL_SECONDS = 8
"""Processor time for unknown regular expressions to get through the texts of the trial; ordinary ones take 0.5 s"""

_EXPANDS = {"NFD": 3, "NFC": 3, "NFKD": 11, "NFKC": 11, "Lowercase": 2, "BertNormalizer": 6, "ByteLevel": 2}
"""Most bytes that each normalizer makes of one byte (Unicode Standard Annex 15, table of expansion factors)"""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{S}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{S}"
)
_ENDINGS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED = _ENDINGS.replace(r"[\r\n]*", r"[\r\n/]*")
PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_ENDINGS}",
    "llama3": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_ENDINGS}",
    "tekken": _CASED.replace("{S}", "") + r"|\p{N}" + _SLASHED,
    "gpt-4o": _CASED.replace("{S}", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _SLASHED,
    "spaces": " {2,}",
    "space": r"\s+",
}
"""Regular expressions of GPT-2, Qwen 2 and 3, Llama 3, OLMo 2, Phi 4, Mistral NeMo and gpt-oss. The time that they take
grows linearly with the text"""
KNOWN_PATTERNS = frozenset(PATTERNS.values())


@dataclass(frozen=True)
class TokenizerFile:
    """What the checks found out about a tokenizer.json."""

    growth: int
    """Most bytes that one byte of text may become before the text is cut into tokens"""
    vocab_size: int
    """The highest id, plus one"""
    added: tuple[tuple[str, int], ...]
    """Tokens besides those of the model's vocabulary, and their ids"""


def examine(path: Path) -> TokenizerFile:
    """Checks a tokenizer.json before the library reads it. Raises ConfigError naming the part that exceeds a limit."""
    spec = read_json(path, MAX_TOKENIZER_BYTES)
    normalizer, decoder = (_growth(spec.get(part), part, path) for part in ("normalizer", "decoder"))
    _check_added(spec.get("post_processor"), path)
    added = tuple(_added(spec))
    tokens = dict((*_vocabulary(spec), *added))
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN:
        raise ConfigError(f"{path}: a token has {longest} characters; at most {MAX_TOKEN} are taken")
    if longest * decoder > MAX_TOKEN * MAX_GROWTH:
        raise ConfigError(f"{path}: decoder: it makes more than {MAX_TOKEN * MAX_GROWTH} bytes of one token")
    if unknown := sorted(set(_patterns(spec)) - KNOWN_PATTERNS):
        _try_out(path, unknown)
    return TokenizerFile(normalizer, max(tokens.values(), default=-1) + 1, added)


def _vocabulary(spec: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    model = spec.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((token, index) for token, index in vocabulary.items() if isinstance(index, int))
    elif isinstance(vocabulary, list):  # a Unigram model's, of tokens and scores
        pairs = (entry[0] if isinstance(entry, list) and entry else None for entry in vocabulary)
        yield from ((token, index) for index, token in enumerate(pairs) if isinstance(token, str))


def _added(spec: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for entry in _dicts(spec.get("added_tokens")):
        if isinstance(entry.get("content"), str) and isinstance(entry.get("id"), int):
            yield entry["content"], entry["id"]


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


# Growth


def _growth(part: Any, where: str, path: Path) -> int:
    factor = 1
    for step in _steps(part):
        factor *= _factor(step)
        if factor > MAX_GROWTH:
            raise ConfigError(
                f"{path}: {where}: it makes up to {factor} bytes of one; at most {MAX_GROWTH} are taken. Was the file "
                "tampered with?"
            )
    return factor


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or a decoder, with sequences unrolled."""
    todo = [part]
    while todo:
        step = todo.pop()
        if isinstance(step, dict):
            inside = step.get("normalizers") or step.get("decoders")
            if step.get("type") == "Sequence":
                todo.extend(reversed(_dicts(inside)))
            else:
                yield step


def _factor(step: Mapping[str, Any]) -> int:
    """Most bytes that a step makes of one byte."""
    kind, added = step.get("type"), step.get("content") or step.get("prepend") or ""
    size = len(str(added).encode(errors="replace"))
    if kind == "Prepend":
        return 1 + size
    if kind == "Replace":
        pattern = step.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        if not found:  # a regular expression may match the empty string before each character
            return 1 + size
        return max(1, -(-size // len(found.encode(errors="replace"))))
    if kind == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"))
    return _EXPANDS.get(str(kind), 1)


def _longest_replacement(charsmap: Any) -> int:
    """The longest replacement in SentencePiece's table, in bytes. The table is the size of a trie, the trie, and the
    replacements, each ended by a zero."""
    try:
        table = base64.b64decode(charsmap or "")
    except (TypeError, ValueError):
        return 1  # the library refuses it
    replacements = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, *map(len, replacements.split(b"\0")))


def _check_added(part: Any, path: Path) -> None:
    """Raises ConfigError for a post-processor that repeats the text, or puts too many tokens around it."""
    added, todo = 0, [part]
    while todo:
        step = todo.pop()
        if not isinstance(step, dict):
            continue
        todo.extend(_dicts(step.get("processors")))
        single = _dicts(step.get("single"))
        if sum("Sequence" in piece for piece in single) > 1:
            raise ConfigError(f"{path}: post_processor: it writes a text more than once")
        tokens = step.get("special_tokens")
        sizes = [len(token.get("ids") or ()) for token in _dicts(list(tokens.values()))] if type(tokens) is dict else []
        added += sum("SpecialToken" in piece for piece in single) * max(sizes, default=1)
    if added > MAX_ADDED:
        raise ConfigError(
            f"{path}: post_processor: it puts {added} tokens around a text; at most {MAX_ADDED} are taken"
        )


# Regular expressions


def _patterns(spec: Mapping[str, Any]) -> Iterator[str]:
    todo: list[Any] = [value for name, value in spec.items() if name not in ("model", "added_tokens")]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                yield value["Regex"]
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)


def _try_out(path: Path, patterns: list[str]) -> None:
    """Encodes texts that make regular expressions backtrack, in a process that can be ended. Raises ConfigError."""
    # The trial is run by its path, so that no module in the folder where the command runs is imported instead.
    command = [sys.executable, "-P", tokenizer_trial.__file__, str(path), str(TRIAL_SECONDS)]
    # The limit is for processor time; one for wall time would refuse good tokenizers on a busy machine.
    done = subprocess.run(command, input=json.dumps(patterns), capture_output=True, text=True, check=False)
    if done.returncode < 0 or done.returncode == GAVE_UP:
        shown = ", ".join(repr(pattern[:200]) for pattern in patterns)
        raise ConfigError(
            f"{path}: a regular expression in it takes time out of proportion to the text, or gives up on it, in a "
            f"trial of at most {TRIAL_SECONDS} s: one of {shown}"
        )
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        raise ConfigError(f"{path}: a regular expression in it can't be tried out: {shortened(why)}")
