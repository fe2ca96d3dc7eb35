"""Which tokens end what a model writes: those that its folder names, and the one that its chat template puts behind an
answer."""

from __future__ import annotations

from collections.abc import Iterable

from model.chat import ChatError, ChatTemplate
from model.tokenizer import TextError, Tokenizer

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
