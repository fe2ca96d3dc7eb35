"""Questions about texts that are given, how likely they are and which vectors stand for them, and their answers: the
same for LLM, Client and AsyncClient; without jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from isthmus.errors import InvalidRequest
from isthmus.types import Conversation, Service, TextPrompt, TokenLogprobs, TokenPrompt

Continuation = str | Sequence[int]
"""A text, or its token ids"""
Pooling = Literal["mean", "last"]
"""Which of the model's last hidden states make a vector: the mean of all, or the last token's"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a continuation of a text is, in the model's own distribution."""

    logprob: float
    """The natural logarithm of its probability: the sum of those of its tokens"""
    is_greedy: bool
    """Whether each token is the likeliest at its place, so that greedy drawing gives the continuation"""
    token_ids: tuple[int, ...]
    """The continuation's"""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of token_ids; None unless they are asked for"""
    prompt_tokens: int
    cached_prompt_tokens: int
    """Tokens of the prompt read from the prefix cache; always 0 from a server without --report-cached-tokens"""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A vector that stands for a text."""

    values: tuple[float, ...]
    prompt_tokens: int
    cached_prompt_tokens: int
    """Tokens read from the prefix cache; always 0 from a server without --report-cached-tokens"""


# What a front end makes of a call


@dataclass(frozen=True)
class ScoreQuestion:
    """Everything that is asked about continuations of one prompt."""

    prompt: TextPrompt | TokenPrompt | Conversation
    continuations: Sequence[Continuation]
    logprobs: int | None = None
    """How many of the likeliest tokens are told at each place, besides the log-probability of the continuation's own;
    None tells neither"""
    truncate_prompt_tokens: int | None = None
    """As in SamplingParams"""
    request_id: str = ""
    service: Service = field(default_factory=Service)


@dataclass(frozen=True)
class EmbedQuestion:
    """Everything that is asked for one text's vector."""

    prompt: TextPrompt | TokenPrompt | Conversation
    pooling: Pooling = "mean"
    normalize: bool = True
    """Whether vectors are scaled to length 1"""
    dimensions: int | None = None
    """How many of a vector's first numbers are kept, before it is scaled; None is all"""
    truncate_prompt_tokens: int | None = None
    """As in SamplingParams"""
    request_id: str = ""
    service: Service = field(default_factory=Service)


def check_pooling(pooling: str) -> Pooling:
    """Raises InvalidRequest for what isn't one."""
    for name in get_args(Pooling):
        if pooling == name:
            return name  # type: ignore[no-any-return]
    raise InvalidRequest("pooling", f"must be one of {', '.join(get_args(Pooling))}, not {pooling!r:.80}")
