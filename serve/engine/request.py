"""A request: what was asked, and how far it has come. Only the engine thread changes it."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from isthmus.serve.engine.constraint import Constraint
from isthmus.serve.engine.sampling import Sampling


class FinishReason(enum.Enum):
    EOS = "eos"
    STOP_TOKEN = "stop token"
    LENGTH = "max_tokens"
    CONTEXT_LENGTH = "context is full"
    CANCELLED = "cancelled"
    CLOSED = "the engine was closed"
    ERROR = "error"


class Logprobs(NamedTuple):
    """What a step told about a drawn token, in the model's own distribution, before temperature and filters."""

    token: float
    """The log-probability of the token that was drawn"""
    top_tokens: tuple[int, ...]
    """The likeliest tokens there, the likeliest first, as many as were asked for"""
    top: tuple[float, ...]
    """Their log-probabilities"""


@dataclass(eq=False)
class Request:
    """One sequence. `tokens` grows by one a step once the prompt is computed."""

    id: str
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end the text; empty goes on past them"""
    constraint: Constraint | None = None
    """What restricts the tokens that it may draw; its own"""
    reply_to: Any = None
    """The receiver of its outputs, which the engine doesn't look at"""
    arrival: float = field(default_factory=time.perf_counter)

    tokens: list[int] = field(init=False)
    """The prompt and the tokens that were drawn, as far as the host knows them"""
    logprobs: list[Logprobs] = field(default_factory=list, init=False)
    """One for each token that was drawn, if they were asked for"""
    computed: int = field(default=0, init=False)
    """Tokens whose keys and values are in the cache, or will be when the launched steps have run"""
    tokens_in_flight: int = field(default=0, init=False)
    """Tokens drawn by launched steps and not read yet: at most 1, or 2 from a plan to the commit of the step before"""
    uses_long_rope: bool = field(default=False, init=False)
    """Whether it is computed with the frequencies of a sequence past the model's rope_switch"""
    slot: int = field(default=-1, init=False)
    pages: list[int] = field(default_factory=list, init=False)
    registered: int = field(default=0, init=False)
    """How many of its first pages the prefix cache knows"""
    page_keys: list[bytes] = field(default_factory=list, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    failure: Exception | None = field(default=None, init=False)
    """The exception that ended it with ERROR; None if its logits weren't finite"""
    stop_token: int | None = field(default=None, init=False)
    cached_tokens: int = field(default=0, init=False)
    recomputed_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    admitted_at: float | None = field(default=None, init=False)
    first_token_at: float | None = field(default=None, init=False)
    finished_at: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the sequence, including those in flight."""
        return len(self.tokens) + self.tokens_in_flight

    @property
    def completion(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def may_grow(self) -> bool:
        """Whether max_tokens leaves room for one more token than those drawn."""
        return self.length - len(self.prompt) < self.max_tokens


@dataclass(frozen=True)
class Output:
    """What a step gave one request: a token, the end, or both."""

    request: Request
    token: int | None
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None
    """What is told about the token, if it was asked for"""
