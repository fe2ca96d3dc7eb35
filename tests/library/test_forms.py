"""A text has the form that was asked for, wherever the model runs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from isthmus import LLM, Client, FinishReason, InvalidRequest, Model
from tests.library.conftest import OpenModel
from tests.serve.api.harness import ENGINE, PROMPT, RunningServer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def models(llm: LLM, server: RunningServer) -> Iterator[tuple[Model, ...]]:
    with Client(server.address) as client:
        yield llm, client


def test_what_comes_has_the_form(models: tuple[Model, ...]) -> None:
    """Programs read it: one text in a thousand that doesn't parse is a program that fails once a day."""
    for seed in range(3):
        texts = {form: set() for form in ("schema", "regex", "choices")}
        for model in models:
            options: dict[str, Any] = {"max_tokens": 120, "seed": seed, "temperature": 1.0}
            person = model.generate(PROMPT, schema=PERSON, **options)
            if person.finish_reason != FinishReason.LENGTH:
                assert list(json.loads(person.text)) == ["name", "age"] and 0 <= json.loads(person.text)["age"] <= 99
            date = model.generate(PROMPT, regex=r"[0-9]{4}-[0-9]{2}", **options)
            assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", date.text) and date.finish_reason != FinishReason.LENGTH
            choice = model.generate(PROMPT, choices=["yes", "no", "perhaps"], **options)
            assert choice.text in ("yes", "no", "perhaps")
            assert "".join(delta.text for delta in model.stream(PROMPT, choices=["yes", "no"], **options)) in (
                "yes",
                "no",
            )
            for form, answer in zip(texts, (person, date, choice), strict=True):
                texts[form].add(answer.token_ids)
        assert all(len(answers) == 1 for answers in texts.values()), "the library and the server differ"


def test_forms_and_free_texts_go_side_by_side(models: tuple[Model, ...]) -> None:
    """Free texts are what they are without them."""
    for model in models:
        alone = model.generate(PROMPT, max_tokens=40, seed=3)
        with ThreadPoolExecutor(4) as pool:
            forms = [pool.submit(model.generate, PROMPT, max_tokens=40, seed=s, json=True) for s in range(3)]
            free = pool.submit(model.generate, PROMPT, max_tokens=40, seed=3)
        assert free.result().token_ids == alone.token_ids
        assert all(form.result().text.lstrip().startswith("{") for form in forms)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("schema", {"schema": {"type": "object", "unevaluatedProperties": False}}),
        ("schema", {"schema": "{"}),
        ("regex", {"regex": "("}),
        ("grammar", {"grammar": "start: nonsense"}),
        ("choices", {"choices": []}),
        ("ignore_eos", {"json": True, "ignore_eos": True}),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused(models: tuple[Model, ...], field: str, options: dict[str, Any]) -> None:
    for model in models:
        with pytest.raises(InvalidRequest) as refused:
            model.generate(PROMPT, max_tokens=4, **options)
        assert refused.value.field.startswith(field), refused.value


FORCED: dict[str, dict[str, Any]] = {
    "schema": {"schema": PERSON},
    "choices": {"choices": ["the first of two long texts that are given", "the second of two long texts"]},
    "other options": {"schema": PERSON, "repetition_penalty": 1.3, "bad_token_ids": [5, 7], "min_tokens": 3},
    "a stop string": {"schema": PERSON, "stop": '"age":'},
}


def test_what_a_form_leaves_no_choice_about_comes_in_fewer_steps(open_model: OpenModel) -> None:
    """Names of properties are most of a JSON text. It is the same text, with the same bits."""
    texts: dict[int, list[tuple[object, ...]]] = {}
    steps: dict[int, int] = {}
    for draft_rows in (0, 8):
        with open_model(engine=dataclasses.replace(ENGINE, draft_rows=draft_rows)) as llm:
            texts[draft_rows] = [
                (answer.token_ids, answer.logprobs, answer.finish_reason, answer.text)
                for options in FORCED.values()
                for seed in range(3)
                for answer in [llm.generate(PROMPT, max_tokens=80, seed=seed, logprobs=2, **options)]
            ]
            counters = llm._engine.scheduler.counters
            steps[draft_rows] = counters.steps
            assert counters.accepted_tokens <= counters.drafted_tokens
            assert (counters.accepted_tokens > 0) == (draft_rows > 0)
    assert texts[0] == texts[8]
    assert steps[8] < 0.9 * steps[0]
