"""An answer that broke off is taken up where it was, by the library and by a server alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from isthmus import LLM, Client, FinishReason, InvalidRequest, Model
from tests.serve.api.harness import PROMPT, RunningServer

DRAWN: dict[str, Any] = {"max_tokens": 40, "seed": 11, "temperature": 1.0, "ignore_eos": True}


@pytest.fixture
def models(llm: LLM, server: RunningServer) -> Iterator[tuple[Model, ...]]:
    with Client(server.address) as client:
        yield llm, client


def test_the_parts_are_the_whole(models: tuple[Model, ...]) -> None:
    """Each model goes on with what the other one began, in the middle of a character, too."""
    for first, second in (models, models[::-1]):
        whole = first.generate(PROMPT, **DRAWN)
        left = whole.text
        for cut in range(1, 40, 3):
            ids = whole.token_ids[:cut]
            rest = second.generate(PROMPT, **DRAWN, resume_token_ids=ids)
            assert rest.token_ids == whole.token_ids[cut:]
            assert left.endswith(rest.text), "the text goes on where it was"
            left = rest.text
            assert rest.completion_tokens == 40 - cut and rest.finish_reason == FinishReason.LENGTH


def test_a_greedy_answer_goes_on_without_a_seed(models: tuple[Model, ...]) -> None:
    """Nothing depends on it, and a stream that broke off never told the one that it had."""
    greedy: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    for model in models:
        whole = model.generate(PROMPT, **greedy)
        rest = model.generate(PROMPT, **greedy, resume_token_ids=whole.token_ids[:7])
        assert rest.token_ids == whole.token_ids[7:]


def test_a_stop_that_had_begun_still_counts(models: tuple[Model, ...]) -> None:
    """What was held back for it comes with the rest, if it isn't one."""
    for model in models:
        whole = model.generate(PROMPT, **DRAWN).text
        stop = whole[len(whole) // 2 : len(whole) // 2 + 6]
        stopped = model.generate(PROMPT, **DRAWN, stop=stop)
        assert stopped.finish_reason == FinishReason.STOP_STRING
        for cut in range(1, len(stopped.token_ids)):
            rest = model.generate(PROMPT, **DRAWN, stop=stop, resume_token_ids=stopped.token_ids[:cut])
            assert rest.finish_reason == FinishReason.STOP_STRING and rest.stop_string == stop
            assert stopped.text.endswith(rest.text) and rest.token_ids == stopped.token_ids[cut:]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("seed", {"seed": None, "resume_token_ids": [1]}),
        ("resume_token_ids", {"resume_token_ids": [1] * 40}),
        ("resume_token_ids[1]", {"resume_token_ids": [1, 1 << 30]}),
    ],
    ids=str,
)
def test_what_cannot_be_resumed_is_named(models: tuple[Model, ...], field: str, options: dict[str, Any]) -> None:
    for model in models:
        with pytest.raises(InvalidRequest) as refused:
            model.generate(PROMPT, **{**DRAWN, **options})
        assert refused.value.field == field


def test_what_its_form_does_not_allow_is_the_callers_mistake(models: tuple[Model, ...]) -> None:
    """The engine would end it as its own failure, of which a server's operator is told."""
    for model in models:
        ids = model.tokenize("7a")
        with pytest.raises(InvalidRequest) as refused:
            model.generate(PROMPT, **{**DRAWN, "ignore_eos": False}, resume_token_ids=ids, regex="[0-9]+")
        assert refused.value.field.startswith("resume_token_ids[")
