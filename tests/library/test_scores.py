"""Scores and embeddings: the numbers of generation for texts that are given, wherever the model runs."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest

from isthmus import LLM, AsyncClient, Client, InvalidRequest, Model, ModelNotFound, Score
from tests.library.conftest import OpenModel
from tests.serve.api.harness import ENGINE, NETWORK, PROMPT, RunningServer


@pytest.fixture
def models(llm: LLM, server: RunningServer) -> Iterator[tuple[Model, ...]]:
    with Client(server.address) as client:
        yield llm, client


def test_a_score_has_the_bits_of_what_is_drawn(models: tuple[Model, ...]) -> None:
    """A policy's ratio, or a filter's threshold, would depend on which of the two was asked."""
    drawn = models[0].generate(PROMPT, max_tokens=20, temperature=0, logprobs=2, ignore_eos=True)
    other = models[0].generate(PROMPT, max_tokens=20, temperature=1.5, seed=3, logprobs=2, ignore_eos=True)
    assert drawn.logprobs is not None and other.logprobs is not None
    for model in models:
        scores = model.score(PROMPT, [list(drawn.token_ids), list(other.token_ids)], logprobs=2)
        assert [score.logprobs for score in scores] == [drawn.logprobs, other.logprobs]
        assert [score.is_greedy for score in scores] == [True, False]
        assert scores[0].logprob == math.fsum(each.logprob for each in drawn.logprobs)
        assert scores[0].token_ids == drawn.token_ids and scores[0].prompt_tokens == drawn.prompt_tokens
        (one,) = [model.score(PROMPT, drawn.token_ids)]
        assert isinstance(one, Score) and one.logprob == scores[0].logprob and one.logprobs is None


def test_a_text_is_cut_where_the_prompt_ends(models: tuple[Model, ...]) -> None:
    """The tokens are those of the whole text, as a model has seen it in training."""
    llm = models[0]
    whole = llm.tokenize("a b c d e f")
    count = len(llm.tokenize("a b c"))
    for model in models:
        score = model.score("a b c", " d e f", logprobs=0)
        assert score.token_ids == tuple(whole[count:]) and score.prompt_tokens == count
        assert score.logprob == model.score(whole[:count], whole[count:]).logprob


def test_a_token_across_the_boundary_is_none(models: tuple[Model, ...]) -> None:
    """It would be the prompt's, and nothing would be left to score."""
    llm = models[0]
    merged, parts = llm.tokenize(PROMPT), [llm.tokenize(PROMPT[:cut]) for cut in range(1, len(PROMPT))]
    cut = next(cut for cut, part in enumerate(parts, start=1) if merged[: len(part)] != part)
    for model in models:
        score = model.score(PROMPT[:cut], PROMPT[cut:])
        assert score.prompt_tokens == len(llm.tokenize(PROMPT[:cut]))
        assert llm.detokenize(score.token_ids) == PROMPT[cut:]


def test_the_log_probabilities_of_a_prompt_are_its_scores(models: tuple[Model, ...]) -> None:
    ids = models[0].tokenize(PROMPT)
    for model in models:
        answer = model.generate(PROMPT, max_tokens=3, temperature=0, prompt_logprobs=2, logprobs=0)
        assert answer.prompt_logprobs == model.score(ids[:1], ids[1:], logprobs=2).logprobs
        assert answer.logprobs is not None and all(each.top == () for each in answer.logprobs)
        plain = model.generate(PROMPT, max_tokens=3, temperature=0)
        assert plain.token_ids == answer.token_ids and plain.prompt_logprobs is None
        told = [d.prompt_logprobs for d in model.stream(PROMPT, max_tokens=3, prompt_logprobs=2)]
        assert [each for each in told if each is not None] == [answer.prompt_logprobs]


def test_of_several_completions_the_first_tells_of_the_prompt(models: tuple[Model, ...]) -> None:
    for model in models:
        several = model.generate(PROMPT, max_tokens=2, n=2, prompt_logprobs=0)
        assert several.prompt_logprobs and several.alternatives[0].prompt_logprobs is None


def test_a_prompt_of_one_token_has_none(models: tuple[Model, ...]) -> None:
    for model in models:
        assert model.generate([5], max_tokens=1, prompt_logprobs=1).prompt_logprobs == ()


def test_the_last_token_of_the_context_can_be_scored(models: tuple[Model, ...]) -> None:
    size = NETWORK.context_length
    for model in models:
        assert model.score([1] * (size - 3), [2, 3, 4]).prompt_tokens == size - 3
        with pytest.raises(InvalidRequest, match=f"the context holds {size}") as refused:
            model.score([1] * (size - 3), [[2], [2, 3, 4, 5]])
        assert refused.value.field == "continuations[1]"


@pytest.mark.parametrize(
    "continuations, options, field",
    [
        ([], {}, "continuations"),
        ([[1]] * 129, {}, "continuations"),
        (["a", ""], {}, "continuations[1]"),
        ([[]], {}, "continuations[0]"),
        ([[1, 512]], {}, "continuations[0][1]"),
        ([[1]], {"logprobs": 21}, "logprobs"),
        ([[1]], {"priority": 101}, "priority"),
        ([[1]], {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_scored_is_named(
    continuations: list[list[int]], options: dict[str, int], field: str, models: tuple[Model, ...]
) -> None:
    for model in models:
        with pytest.raises(InvalidRequest) as refused:
            model.score("a", continuations, **options)  # type: ignore[arg-type]
        assert refused.value.field.removesuffix(".token_ids.ids") == field


def test_embeddings_are_the_same_everywhere(llm: LLM, server: RunningServer) -> None:
    async def ask() -> list[tuple[float, ...]]:
        async with AsyncClient(server.address) as client:
            return [(await model.embed(PROMPT)).values for model in (client, llm.aio)] + [
                each.values for each in await client.embed([PROMPT, "a"])
            ]

    with Client(server.address) as client:
        mean, last = llm.embed(PROMPT), llm.embed(PROMPT, pooling="last")
        assert client.embed(PROMPT).values == mean.values != last.values == client.embed(PROMPT, pooling="last").values
        assert asyncio.run(ask()) == [mean.values] * 3 + [llm.embed("a").values]
        assert [each.values for each in llm.embed([PROMPT, "a"])] == [mean.values, llm.embed("a").values]
        assert len(mean.values) == client.model_info().embedding_size == NETWORK.dim
        assert mean.prompt_tokens == len(llm.tokenize(PROMPT))


def test_an_embedding_has_the_length_and_the_size_that_are_asked_for(models: tuple[Model, ...]) -> None:
    for model in models:
        plain = model.embed(PROMPT, normalize=False).values
        length = math.sqrt(math.fsum(x * x for x in plain))
        assert abs(length - 1) > 0.1
        assert model.embed(PROMPT).values == pytest.approx([x / length for x in plain], rel=1e-6)
        short = model.embed(PROMPT, dimensions=5).values
        norm = math.sqrt(math.fsum(x * x for x in plain[:5]))
        assert short == pytest.approx([x / norm for x in plain[:5]], rel=1e-6)
        assert model.embed(PROMPT, dimensions=5, normalize=False).values == plain[:5]


@pytest.mark.parametrize(
    "prompt, options, field",
    [
        ("", {}, "prompt"),
        ([1, 512], {}, "prompt[1]"),
        ("a", {"pooling": "max"}, "pooling"),
        ("a", {"dimensions": 0}, "dimensions"),
        ("a", {"dimensions": NETWORK.dim + 1}, "dimensions"),
        ("a", {"normalize": "no"}, "normalize"),
        ("a", {"cache_salt": "a" * 257}, "cache_salt"),
    ],
)
def test_what_cannot_be_embedded_is_named(
    prompt: str, options: dict[str, int], field: str, models: tuple[Model, ...]
) -> None:
    for model in models:
        with pytest.raises(InvalidRequest) as refused:
            model.embed(prompt, **options)  # type: ignore[arg-type]
        assert refused.value.field == field


def test_another_model_than_is_here_is_not_found(models: tuple[Model, ...], server: RunningServer) -> None:
    """A client that was pointed to the wrong server would get answers of another model."""
    name = server.server.session.model.name
    for model in models:
        for ask in (
            lambda asked, model=model: model.generate("a", max_tokens=1, model=asked),
            lambda asked, model=model: model.score("a", "b", model=asked),
            lambda asked, model=model: model.embed("a", model=asked),
        ):
            with pytest.raises(ModelNotFound, match="is not here") as refused:
                ask("another")
            assert refused.value.field == "model" and name in str(refused.value)
            assert ask(name) is not None


def test_what_was_foretold_comes_in_fewer_steps_and_is_the_same(llm: LLM) -> None:
    plain = llm.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True, cache="off")
    counters = llm._engine.scheduler.counters
    for predicted in (plain.text, "something else altogether", plain.text[: len(plain.text) // 2], ""):
        steps, accepted = counters.steps, counters.accepted_tokens
        foretold = llm.generate(
            PROMPT, max_tokens=60, temperature=0, ignore_eos=True, cache="off", predicted_text=predicted
        )
        assert foretold.token_ids == plain.token_ids
        if predicted == plain.text and llm.tokenize(plain.text)[-60:] == list(plain.token_ids):
            assert counters.accepted_tokens - accepted > 40 and counters.steps - steps < 40


@pytest.mark.parametrize(
    "continuation, field",
    [
        ("\ud800", "continuations[0]"),
        (5, "continuations[0]"),
        (None, "continuations[0]"),
        (["a", 5], "continuations[1]"),
    ],
)
def test_what_is_no_continuation_is_refused_alike(
    continuation: Any, field: str, models: tuple[Model, ...], llm: LLM, server: RunningServer
) -> None:
    async def ask() -> list[str]:
        async with AsyncClient(server.address) as client:
            found = []
            for model in (llm.aio, client):
                with pytest.raises(InvalidRequest) as refused:
                    await model.score("a", continuation)
                found.append(refused.value.field)
            return found

    for model in models:
        with pytest.raises(InvalidRequest) as refused:
            model.score("a", continuation)
        assert refused.value.field == field
    assert asyncio.run(ask()) == [field] * 2


def test_a_prompt_that_fills_the_context_can_be_embedded(models: tuple[Model, ...]) -> None:
    """It draws nothing, so it needs no room for more."""
    size = NETWORK.context_length
    for model in models:
        assert model.embed([1] * size).prompt_tokens == size
        with pytest.raises(InvalidRequest, match=f"has {size + 1} tokens; the context holds {size}"):
            model.embed([1] * (size + 1))


def test_unknown_options_and_too_many_items_are_named(models: tuple[Model, ...], open_model: OpenModel) -> None:
    for model in models:
        for ask in (model.embed, lambda *a, model=model, **o: model.score(*a, "b", **o)):
            with pytest.raises(TypeError, match="unknown option 'best'; there are"):
                ask("a", best=1)  # type: ignore[call-arg]
    with open_model(engine=dataclasses.replace(ENGINE, max_sequences=2, max_waiting=1)) as small:
        with pytest.raises(InvalidRequest, match="it must make 1 to 3") as refused:
            small.score("a", ["b"] * 4)
        assert refused.value.field == "continuations"


def test_more_text_than_can_be_encoded_at_once_is_refused(models: tuple[Model, ...]) -> None:
    """Each continuation is encoded behind the prompt: a small message could keep the server busy for minutes."""
    for model in models:
        with pytest.raises(InvalidRequest, match="4000000 are taken at once") as refused:
            model.score("a " * 40_000, ["b"] * 100, truncate_prompt_tokens=3)
        assert refused.value.field == "continuations"
