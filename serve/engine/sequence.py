"""A request in the scheduler's hands: how far it has come. Only the engine thread has one."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from isthmus.serve.engine.constraint import Constraint, ConstraintError
from isthmus.serve.engine.drafts import Guesser
from isthmus.serve.engine.masks import Masks
from isthmus.serve.engine.messages import End, Ending, Logprobs, Progress, Request
from isthmus.serve.engine.pooling import Embedding


@dataclass(eq=False)
class Sequence:
    """`tokens` grows by one a step once the prompt is computed. Of a prompt that is scored it holds at first what
    comes before the first scored token; the others come to it as drawn ones do, many a step."""

    request: Request
    prompt_length: int = field(init=False)
    drawn_from: int = field(init=False)
    """The index of its first token that isn't computed in a block at first, because it was drawn or scored"""
    tokens: list[int] = field(init=False)
    """The prompt, or what of it isn't left to score, and the tokens that were drawn, here and before, as far as the
    host knows them"""
    logprobs: list[Logprobs] = field(default_factory=list, init=False)
    """One for each token that was drawn, if they were asked for"""
    prompt_logprobs: list[Logprobs] = field(default_factory=list, init=False)
    """One for each token that was scored"""
    computed: int = field(default=0, init=False)
    """Tokens whose keys and values are in the cache, or will be when the launched steps have run"""
    tokens_in_flight: int = field(default=0, init=False)
    """Tokens drawn or scored by launched steps and not read yet. Of drawn ones that is at most 1 for each step, and 1
    more from a plan to the commit of the launch before"""
    uses_long_rope: bool = field(default=False, init=False)
    """Whether it is computed with the frequencies of a sequence past the model's rope_switch"""
    masks: Masks | None = field(default=None, init=False)
    """The tokens that the request's options let be drawn; None where they let all"""
    constraint: Constraint | None = field(default=None, init=False)
    """The state of the request's constraint after the tokens that the host knows; None where it has none"""
    guesser: Guesser | None = field(default=None, init=False)
    """What guesses its next tokens, once that may be worth it"""
    embedding: Embedding | None = field(default=None, init=False)
    """What is known of the embedding that the request asks for; None where it asks for tokens"""
    adjusts: bool = field(default=False, init=False)
    """Whether its draws see other logits than the model's"""
    slot: int = field(default=-1, init=False)
    pages: list[int] = field(default_factory=list, init=False)
    registered: int = field(default=0, init=False)
    """How many of its first pages the prefix cache knows"""
    page_keys: list[bytes] = field(default_factory=list, init=False)
    number: int = field(default=0, init=False)
    """Its number in the order of arrival"""
    admission: int = field(default=0, init=False)
    """Its number in the order of first starts, which a preemption doesn't change; 0 until it starts"""
    stays: bool = field(default=False, init=False)
    """Whether it started because its priority had been passed over so often; no other takes its place then"""
    passed: int = field(default=0, init=False)
    """Sequences behind it in the queue that started while it found no pages"""
    ending: Ending | None = field(default=None, init=False)
    cached_tokens: int = field(default=0, init=False)
    recomputed_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    admitted_at: float | None = field(default=None, init=False)
    first_token_at: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.prompt_length = len(request.prompt)
        self.drawn_from = self.prompt_length if request.scored_from is None else request.scored_from
        self.tokens = [*request.prompt[: self.drawn_from], *request.resumed]
        if request.pooling is not None:
            self.embedding = Embedding(request.pooling, self.prompt_length)

    @property
    def length(self) -> int:
        """Tokens of the sequence, including those in flight."""
        return len(self.tokens) + self.tokens_in_flight

    @property
    def completion(self) -> list[int]:
        """The tokens that were drawn here."""
        return self.tokens[self.prompt_length + len(self.request.resumed) :]

    @property
    def scores(self) -> bool:
        """Whether its next token is one of the prompt, which is scored."""
        return self.length < self.prompt_length

    @property
    def in_prompt(self) -> bool:
        """Whether the next token that the host gets to know is one of the prompt, which was scored."""
        return len(self.tokens) < self.prompt_length

    def known(self, index: int) -> int:
        """A token that the host knows: of the prompt, which may be left to score, or a drawn one."""
        return self.request.prompt[index] if index < self.prompt_length else self.tokens[index]

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end it."""
        return self.request.eos_ids | self.request.stop_ids

    @property
    def may_grow(self) -> bool:
        """Whether it has a next token: one to score, or one that max_tokens leaves room for."""
        return self.length - self.prompt_length < self.request.max_tokens

    def fill_masks(self, rows: Tokens[np.ndarray], drawn: int, guesses: Tokens[int]) -> None:
        """Clears the bits of ids, in int32[words] each, that may not come after `drawn` tokens, all of which are known,
        and after each of the guesses that follow them. Where constraint and options have no id in common, the
        constraint decides. Raises ConstraintError."""
        states = repeat(None) if self.constraint is None else _states(self.constraint, guesses)
        for index, (row, state) in enumerate(zip(rows, states, strict=False)):
            if state is not None:
                state.fill(row)
            if self.masks is not None and (both := row & self.masks.at(drawn + index)).any():
                row[:] = both

    def progress(self, now: float) -> Progress:
        """How far it has come, at `now`."""
        return Progress(
            now,
            self.admitted_at,
            self.first_token_at,
            self.cached_tokens,
            self.recomputed_tokens,
            self.preemptions,
        )

    def end(self, now: float, failure: Exception | None = None) -> End:
        """How it ended, at `now`."""
        assert self.ending is not None
        told, scored = tuple(self.logprobs), tuple(self.prompt_logprobs)
        embedding = self.embedding.vector if self.embedding is not None and self.ending is Ending.EMBEDDED else None
        return End(self.ending, tuple(self.completion), told, failure, self.progress(now), scored, embedding)


def _states(constraint: Constraint, guesses: Tokens[int]) -> Iterator[Constraint]:
    """Yields a constraint as it is, and as it is after each of the guesses, up to one that may not come or that ends
    the text: what is drawn behind that is never taken."""
    yield constraint
    if not guesses:
        return
    ahead = constraint.copy()
    for guess in guesses:
        try:
            ahead.accept(guess)
        except ConstraintError:
            return
        if ahead.done:
            return
        yield ahead
