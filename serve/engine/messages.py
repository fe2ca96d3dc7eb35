"""What goes into an engine and what comes out of it. All of it is immutable, so any thread may read it at any time."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from isthmus.serve.engine.adapters import Resident
from isthmus.serve.engine.constraint import Constraint
from isthmus.serve.engine.pooling import Pooling
from isthmus.serve.engine.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence that the engine is asked for. Two requests are never equal, even with the same id."""

    id: str
    prompt: Sequence[int]
    """Token ids, at least one"""
    sampling: Sampling
    max_tokens: int
    """Most tokens to draw, those of `resumed` included; 0 for an embedding, and for a prompt that is only scored"""
    stop_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end the text; empty goes on past them"""
    constraint: Constraint | None = None
    """What restricts the tokens that may be drawn, at its beginning: the engine steps a copy"""
    predicted: Sequence[int] = ()
    """Tokens that the text is expected to have, which are guesses for speculative decoding and change nothing else"""
    resumed: Sequence[int] = ()
    """Tokens that were drawn before by a request like this, which goes on after them as that one would have"""
    scored_from: int | None = None
    """The index in the prompt, at least 1, from which on its tokens are scored: what is told about a drawn token is
    told about each, as if it had been drawn there. None scores none"""
    adapter: Resident | None = None
    """The adapter that its tokens are computed with; None is none"""
    pooling: Pooling | None = None
    """What the prompt's embedding is made of, if that is what is asked for. Nothing is drawn then, and what is said
    about draws means nothing"""
    tenant: str = ""
    """Who asks: tenants of one priority share the engine"""
    priority: int = 0
    """The higher, the sooner it starts"""
    deadline: float | None = None
    """When it is of no use any more, on the clock of `arrival`: it isn't started then, and of one tenant's requests the
    one with the earliest starts first"""
    max_queue_time: float | None = None
    """Most seconds from `arrival` until it starts"""
    cache_salt: bytes = b""
    """Only requests with the same salt share pages of the prefix cache"""
    cache_read: bool = True
    """Whether it may start from pages of the prefix cache"""
    cache_write: bool = True
    """Whether the prefix cache keeps its pages"""
    reply_to: Any = None
    """The receiver of its events, which the engine doesn't look at"""
    text_options: Any = None
    """How whoever reads its events makes text of them (serve/prepare/answer.py), which the engine doesn't look at"""
    arrival: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Cancel:
    """Ends this request, and not another that has come since with the same id."""

    request: Request


class Ending(enum.Enum):
    """Why a request ended."""

    EOS = "eos"
    STOP_TOKEN = "stop token"
    COMPLETE = "nothing may follow by its constraint"
    LENGTH = "max_tokens"
    CONTEXT_LENGTH = "context is full"
    EMBEDDED = "its embedding is whole"
    CANCELLED = "cancelled"
    QUEUE_TIME = "max_queue_time passed before it started"
    DEADLINE = "its deadline passed before it started"
    CLOSED = "the engine was closed"
    ERROR = "error"


class Logprobs(NamedTuple):
    """What a step told about a token that was drawn, or scored, in the model's own distribution, before temperature and
    filters."""

    token: float
    """The log-probability of that token"""
    top_tokens: tuple[int, ...]
    """The likeliest tokens there, the likeliest first, as many as were asked for"""
    top: tuple[float, ...]
    """Their log-probabilities"""


class Progress(NamedTuple):
    """How far a request had come at one of its events."""

    at: float = 0.0
    """When that was, in seconds on the clock of Request.arrival, as the next two"""
    admitted_at: float | None = None
    """When it was started"""
    first_token_at: float | None = None
    cached_tokens: int = 0
    """Tokens of the prompt that were read from the prefix cache"""
    recomputed_tokens: int = 0
    """Tokens that were computed again after a preemption"""
    preemptions: int = 0


NO_PROGRESS = Progress()


@dataclass(frozen=True)
class End:
    """How a request ended, and all that it got."""

    reason: Ending
    tokens: tuple[int, ...] = ()
    """All tokens that were drawn here, the one that ended the sequence included"""
    logprobs: tuple[Logprobs, ...] = ()
    """One for each token, if they were asked for"""
    failure: Exception | None = None
    """The exception that ended it with ERROR; None if its logits or hidden states weren't finite"""
    progress: Progress = NO_PROGRESS
    """How far it had come then"""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    """One for each token of the prompt that was scored, in their order"""
    embedding: np.ndarray | None = field(default=None, compare=False)
    """float32[dim], which can't be written to, as the hidden states give it, not normalised; None without EMBEDDED. Two
    ends are compared without it"""

    @property
    def stop_token(self) -> int | None:
        """The token that ended the sequence, if one did."""
        return self.tokens[-1] if self.reason in (Ending.EOS, Ending.STOP_TOKEN) else None


@dataclass(frozen=True)
class Event:
    """What a step gave one request: tokens, what is told about scored ones, its end, or some of these."""

    request: Request
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    """What is told about each token, if it was asked for"""
    end: End | None = None
    progress: Progress = NO_PROGRESS
    """How far the request has come with these tokens"""
    prompt_logprobs: tuple[Logprobs, ...] = ()
    """What is told about each of the prompt's tokens that the step scored, in their order"""
