"""Turns what a question asks of the sampler into the engine's Sampling, with every check."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.arguments import check_flag, check_int, check_whole, check_within, not_a_token
from isthmus.errors import InvalidRequest
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import MAX_REPETITION, MIN_REPETITION, GenerationDefaults
from isthmus.serve.engine.sampling import MOST_BIASED, MOST_LOGPROBS, Sampling
from isthmus.serve.prepare.checks import check_token_ids, first
from isthmus.types import SamplingParams, check_bias, check_sized

DEFAULT_MAX_TOKENS = 256
MAX_STOP_TOKENS = 64
MAX_TEMPERATURE = 100.0
MAX_BIAS = 100.0
MAX_PENALTY = 2.0


@dataclass(frozen=True)
class Drawing:
    """How a request's tokens are drawn, and when that ends."""

    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]


def drawing_of(asked: SamplingParams, recommended: GenerationDefaults, tokenizer: Tokenizer, left: int) -> Drawing:
    """How to draw. recommended: for what is left open. left: tokens that the context has room for after the prompt.
    Raises InvalidRequest."""
    vocab = tokenizer.vocab_size
    stop_ids = _ids("stop_token_ids", asked.stop_token_ids, vocab, MAX_STOP_TOKENS)
    eos_ids = frozenset() if check_flag("ignore_eos", asked.ignore_eos) else tokenizer.eos_ids
    max_tokens = check_int("max_tokens", first(asked.max_tokens, None, min(DEFAULT_MAX_TOKENS, left)))
    within = check_within
    sampling = Sampling(
        temperature=within("temperature", first(asked.temperature, recommended.temperature, 1.0), 0, MAX_TEMPERATURE),
        top_k=check_whole("top_k", first(asked.top_k, recommended.top_k, 0), 31),
        top_p=within("top_p", first(asked.top_p, recommended.top_p, 1.0), 0, 1, open_low=True),
        min_p=within("min_p", first(asked.min_p, recommended.min_p, 0.0), 0, 1),
        seed=check_whole("seed", asked.seed, 64) if asked.seed is not None else secrets.randbits(63),
        logprobs=max(
            check_logprobs("logprobs", asked.logprobs), check_logprobs("prompt_logprobs", asked.prompt_logprobs)
        ),
        repetition_penalty=within(
            "repetition_penalty",
            first(asked.repetition_penalty, recommended.repetition_penalty, 1.0),
            MIN_REPETITION,
            MAX_REPETITION,
        ),
        frequency_penalty=within(
            "frequency_penalty", first(asked.frequency_penalty, None, 0.0), -MAX_PENALTY, MAX_PENALTY
        ),
        presence_penalty=within(
            "presence_penalty", first(asked.presence_penalty, None, 0.0), -MAX_PENALTY, MAX_PENALTY
        ),
        bias=_bias(asked.logit_bias, vocab),
        allowed=None if asked.allowed_token_ids is None else _ids("allowed_token_ids", asked.allowed_token_ids, vocab),
        bad=_ids("bad_token_ids", asked.bad_token_ids, vocab),
        min_tokens=_min_tokens(asked.min_tokens, max_tokens),
    )
    _check_something_left(sampling, stop_ids | eos_ids, vocab)
    return Drawing(sampling, max_tokens, stop_ids, eos_ids)


def _ids(field: str, given: Sequence[int], vocab: int, most: int | None = None) -> frozenset[int]:
    most = vocab if most is None else most
    if len(check_sized(field, given)) > most:
        raise InvalidRequest(field, f"has {len(given)} ids; at most {most}")
    return frozenset(check_token_ids(field, given, vocab).tolist())


def _bias(given: Mapping[int, float], vocab: int) -> tuple[tuple[int, float], ...]:
    if len(check_bias(given)) > MOST_BIASED:
        raise InvalidRequest("logit_bias", f"has {len(given)} ids; at most {MOST_BIASED}")
    return tuple(
        (_biased(token, vocab), check_within(f"logit_bias[{token}]", value, -MAX_BIAS, MAX_BIAS))
        for token, value in given.items()
    )


def _biased(token: int, vocab: int) -> int:
    token = check_int("logit_bias", token)
    if not 0 <= token < vocab:
        raise InvalidRequest(f"logit_bias[{token}]", f"{not_a_token(token)}; the vocabulary has {vocab}")
    return token


def check_logprobs(field: str, count: int | None) -> int:
    """How many of the likeliest tokens are told; -1 if nothing is. Raises InvalidRequest."""
    if count is None:
        return -1
    count = check_int(field, count)
    if not 0 <= count <= MOST_LOGPROBS:
        raise InvalidRequest(field, f"must be 0 to {MOST_LOGPROBS}, not {count}")
    return count


def _min_tokens(least: int | None, most: int) -> int:
    if least is None:
        return 0
    least = check_int("min_tokens", least)
    if not 0 <= least <= most:
        raise InvalidRequest("min_tokens", f"must be 0 to max_tokens, which is {most}, not {least}")
    return least


def _check_something_left(sampling: Sampling, ends: frozenset[int], vocab: int) -> None:
    """Raises InvalidRequest if the masks leave no token to draw."""
    if not sampling.masks:
        return
    left = frozenset(range(vocab)) if sampling.allowed is None else sampling.allowed
    if left - sampling.bad - (ends if sampling.min_tokens else frozenset()):
        return
    if not left:
        raise InvalidRequest("allowed_token_ids", "must not be empty; leave it out to allow all")
    if not left - sampling.bad:
        raise InvalidRequest("bad_token_ids", "leaves no token that may be drawn")
    raise InvalidRequest("min_tokens", "asks for tokens before the end, but only tokens that end the text may be drawn")
