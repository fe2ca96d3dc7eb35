"""Finds the tokens that end what a model writes: those that its folder names, and the one that its chat template puts
after an answer. Also warns of flags for the tokens around a text that have no effect."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from isthmus.model.text.chat import ChatError, ChatTemplate, special_tokens, tokenizer_config
from isthmus.model.text.tokenizer import TextError, Tokenizer

_ANSWER = "Quite so"
"""The answer in the conversation that a template is tried with"""


def end_ids(ids: Iterable[int], spelt: str | None, tokenizer: Tokenizer, chat: ChatTemplate | None) -> frozenset[int]:
    """The ids that end a text when one of them is drawn. ids: those in generation_config.json or config.json. spelt:
    the eos_token in tokenizer_config.json; some folders with a chat template set it and keep their base model's ids."""
    named = None if spelt is None else tokenizer.token_id(spelt)
    found = {*ids, *turn_end(tokenizer, chat)} | ({named} if named is not None else set())
    return frozenset(token for token in found if token < tokenizer.vocab_size)


def turn_end(tokenizer: Tokenizer, chat: ChatTemplate | None) -> frozenset[int]:
    """The special token that the template writes right after the last answer; empty if it writes none there."""
    if chat is None:
        return frozenset()
    try:
        text = chat.render(
            [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": _ANSWER}],
            add_generation_prompt=False,
        )
        behind = tokenizer.encode_chat(text.rpartition(_ANSWER)[2].lstrip()) if _ANSWER in text else []
    except (ChatError, TextError):
        return frozenset()  # the template doesn't accept such a conversation
    return frozenset(behind[:1]) & tokenizer.special_ids


def unheeded_flags(folder: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Warnings of add_bos_token and add_eos_token if they contradict the post-processor in tokenizer.json.

    If there is a tokenizer.json, transformers 5 ignores both flags, and so do we. Earlier versions read them for some
    classes of tokenizers. Raises ConfigError for a malformed tokenizer_config.json.
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
