"""Which tokens end what a model writes: those that its folder names, and the one that its chat template puts behind an
answer. And what a folder says of the tokens around a text, and nobody does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from isthmus.model.text.chat import ChatError, ChatTemplate, special_tokens, tokenizer_config
from isthmus.model.text.tokenizer import TextError, Tokenizer

_ANSWER = "Quite so"
"""Of the conversation that a template is tried with"""


def end_ids(ids: Iterable[int], spelt: str | None, tokenizer: Tokenizer, chat: ChatTemplate | None) -> frozenset[int]:
    """Drawing one of these ends a text. ids: generation_config.json's, or config.json's. spelt: tokenizer_config.json's
    eos_token, which some folders with a chat template set, and leave the ids at their base model's."""
    named = None if spelt is None else tokenizer.token_id(spelt)
    found = {*ids, *turn_end(tokenizer, chat)} | ({named} if named is not None else set())
    return frozenset(token for token in found if token < tokenizer.vocab_size)


def turn_end(tokenizer: Tokenizer, chat: ChatTemplate | None) -> frozenset[int]:
    """The special token that the template writes right behind the last answer; none if it writes no such token."""
    if chat is None:
        return frozenset()
    try:
        text = chat.render(
            [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": _ANSWER}],
            add_generation_prompt=False,
        )
        behind = tokenizer.encode_chat(text.rpartition(_ANSWER)[2].lstrip()) if _ANSWER in text else []
    except (ChatError, TextError):
        return frozenset()  # a template that takes no such conversation
    return frozenset(behind[:1]) & tokenizer.special_ids


def unheeded_flags(folder: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Warnings of add_bos_token and add_eos_token that say otherwise than tokenizer.json's post-processor does.

    transformers 5 reads neither where there is a tokenizer.json, and nor do we: versions before it did for some classes
    of tokenizers. Raises ConfigError for a malformed tokenizer_config.json.
    """
    config, names = tokenizer_config(folder), special_tokens(folder)
    added = tokenizer.encode("")
    warnings = []
    for flag, name, place, found in (
        ("add_bos_token", "bos_token", "before", added[:1]),
        ("add_eos_token", "eos_token", "behind", added[1:][-1:]),
    ):
        asked, token = config.get(flag), names.get(name)
        if not isinstance(asked, bool) or token is None or (known := tokenizer.token_id(token)) is None:
            continue
        if asked != (found == [known]):
            does = "puts" if found == [known] else "doesn't put"
            warnings.append(
                f"{folder / 'tokenizer_config.json'}: {flag}={str(asked).lower()} has no effect, as in transformers 5: "
                f"tokenizer.json (post_processor) decides, and {does} {token} {place} a text"
            )
    return tuple(warnings)
