"""What may be drawn: penalties, bias and masks, the same wherever the model runs, and refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from isthmus import LLM, Client, InvalidRequest, Model
from tests.serve.api.harness import PROMPT, RunningServer

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture
def models(llm: LLM, server: RunningServer) -> Iterator[tuple[Model, ...]]:
    with Client(server.address) as client:
        yield llm, client


def texts(models: tuple[Model, ...], **options: Any) -> tuple[int, ...]:
    """The token ids of the one answer that all models give."""
    answers = {model.generate(PROMPT, **{**GREEDY, **options}).token_ids for model in models}
    (answer,) = answers
    return answer


def test_penalties_make_a_text_repeat_itself_less(models: tuple[Model, ...]) -> None:
    plain = texts(models)
    for options in ({"repetition_penalty": 3.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert len(set(texts(models, **options))) > len(set(plain)), options


def test_a_token_comes_or_doesnt_as_it_is_asked_for(models: tuple[Model, ...]) -> None:
    plain = texts(models)
    assert set(texts(models, logit_bias={7: 100.0})) == {7}
    assert plain[0] not in texts(models, logit_bias={plain[0]: -100.0})
    assert plain[0] not in texts(models, bad_token_ids=[plain[0]])
    assert set(texts(models, allowed_token_ids=[3, 9, 11])) <= {3, 9, 11}
    with_neither = texts(models, allowed_token_ids=[3, 9, 11], bad_token_ids=[3, 9])
    assert set(with_neither) == {11}


def test_a_text_has_its_least_length(models: tuple[Model, ...]) -> None:
    """A stop that comes at once is often a model that has nothing to say yet."""
    first = texts(models)[0]
    for model in models:
        stop = {"stop_token_ids": [first]}
        assert model.generate(PROMPT, **GREEDY, **stop).completion_tokens == 1
        assert model.generate(PROMPT, **GREEDY, **stop, min_tokens=9).completion_tokens >= 9


@pytest.mark.parametrize("bound", [1e-6, 10.0])
def test_the_bounds_of_a_penalty_work(models: tuple[Model, ...], bound: float) -> None:
    """What is documented must be computed, also after a float32 on the wire has rounded it down."""
    assert len(texts(models, repetition_penalty=bound)) == GREEDY["max_tokens"]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": 1e-45}),
        ("frequency_penalty", {"frequency_penalty": 2.5}),
        ("presence_penalty", {"presence_penalty": float("nan")}),
        ("logit_bias[3]", {"logit_bias": {3: 101.0}}),
        ("logit_bias", {"logit_bias": dict.fromkeys(range(301), 1.0)}),
        ("logit_bias[2147483648]", {"logit_bias": {1 << 31: 1.0}}),
        ("allowed_token_ids", {"allowed_token_ids": []}),
        ("bad_token_ids[0]", {"bad_token_ids": [1 << 31]}),
        ("bad_token_ids", {"allowed_token_ids": [3], "bad_token_ids": [3]}),
        ("min_tokens", {"min_tokens": 25}),
        ("min_tokens", {"min_tokens": 2, "allowed_token_ids": [3], "stop_token_ids": [3]}),
    ],
    ids=str,
)
def test_what_cannot_work_is_named(models: tuple[Model, ...], field: str, options: dict[str, Any]) -> None:
    """Else a caller gets an internal error, or a text that isn't what was asked for."""
    for model in models:
        with pytest.raises(InvalidRequest) as refused:
            model.generate(PROMPT, **{**GREEDY, **options})
        assert refused.value.field == field
