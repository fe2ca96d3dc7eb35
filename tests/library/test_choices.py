"""Several completions of one prompt are those of several requests, for less."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from isthmus import LLM, Client, Completion, Delta, InvalidRequest, Model, SamplingParams
from tests.library.conftest import OpenModel
from tests.serve.api.harness import ENGINE, PROMPT, RunningServer

DRAWN = SamplingParams(max_tokens=12, seed=2**64 - 2, temperature=0.9, logprobs=1)


@pytest.fixture
def models(llm: LLM, server: RunningServer) -> Iterator[tuple[Model, ...]]:
    with Client(server.address) as client:
        yield llm, client


def _told(completion: Completion) -> tuple[object, ...]:
    return completion.text, completion.token_ids, completion.logprobs, completion.finish_reason, completion.seed


def test_each_is_what_its_seed_draws_alone(models: tuple[Model, ...]) -> None:
    """Else a choice that somebody likes can't be had again. Seeds go on at 0 after the last one."""
    seeds = [2**64 - 2, 2**64 - 1, 0, 1]
    for model in models:
        several = model.generate(PROMPT, DRAWN, n=4)
        assert [choice.seed for choice in several.choices] == seeds and len(several.alternatives) == 3
        alone = [model.generate(PROMPT, DRAWN, seed=seed) for seed in seeds]
        assert list(map(_told, several.choices)) == list(map(_told, alone))
        assert len({choice.token_ids for choice in several.choices}) == 4
        assert alone[0].alternatives == () and alone[0].choices == (alone[0],)


def test_a_stream_names_the_choice_of_each_delta(models: tuple[Model, ...]) -> None:
    for model in models:
        whole = model.generate(PROMPT, DRAWN, n=3)
        by_choice: dict[int, list[Delta]] = {0: [], 1: [], 2: []}
        for delta in model.stream(PROMPT, DRAWN, n=3):
            by_choice[delta.index].append(delta)
        for index, choice in enumerate(whole.choices):
            deltas = by_choice[index]
            assert "".join(delta.text for delta in deltas) == choice.text
            ends = [delta.completion for delta in deltas if delta.completion is not None]
            assert ends == [deltas[-1].completion] and _told(ends[0]) == _told(choice)


def test_a_stop_string_ends_one_of_them(models: tuple[Model, ...]) -> None:
    """The others would be cut off, or go on unread."""
    free = models[0].generate(PROMPT, DRAWN, n=3)
    cut, other = free.choices[1].text, free.choices[0].text
    stop = next(cut[at : at + 3] for at in range(1, len(cut)) if cut[at : at + 3] not in other)
    for model in models:
        answer = model.generate(PROMPT, DRAWN, n=3, stop=stop)
        assert answer.choices[0].text == free.choices[0].text
        assert answer.choices[1].finish_reason == "STOP_STRING"
        assert answer.choices[1].text == free.choices[1].text.partition(stop)[0]


@pytest.mark.parametrize("cache", ["on", "off"])
def test_the_prompt_is_computed_once(llm: LLM, cache: str) -> None:
    """It would take n times as long to the first token. Without the cache they share with each other only."""
    prompt = [(7 * index + (cache == "off")) % 200 for index in range(100)]
    several = llm.generate(prompt, DRAWN, n=4, cache=cache)
    assert several.cached_prompt_tokens == 0
    assert [choice.cached_prompt_tokens for choice in several.alternatives] == [96] * 3
    again = llm.generate(prompt, DRAWN)
    assert again.cached_prompt_tokens == (96 if cache == "on" else 0)


def test_what_cannot_be_is_refused_by_its_name(models: tuple[Model, ...]) -> None:
    for model in models:
        for options, field in (
            ({"n": 0}, "n"),
            ({"n": 129}, "n"),
            ({"n": 1.5}, "n"),
            ({"n": 2, "resume_token_ids": [1]}, "resume_token_ids"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                model.generate(PROMPT, DRAWN, **options)  # type: ignore[arg-type]
            assert refused.value.field == field


@pytest.mark.slow
def test_more_than_there_is_room_for_are_none(open_model: OpenModel) -> None:
    """They would be refused as overload for ever, or half of them would run."""
    import dataclasses

    with open_model(engine=dataclasses.replace(ENGINE, max_sequences=2, max_waiting=1)) as llm:
        with pytest.raises(InvalidRequest, match="it must make 1 to 3"):
            llm.generate(PROMPT, DRAWN, n=4)
        assert len(llm.generate(PROMPT, DRAWN, n=3).choices) == 3
        assert llm._engine.in_flight == 0
