"""What is asked becomes the engine's request: what it leaves open is as the model's makers recommend, and what can't
work is refused by name, for every front end alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import InvalidRequest
from isthmus.forms import Choices, Regex
from isthmus.model.text.chat import ChatTemplate
from isthmus.model.text.stops import MAX_STOP_CHARACTERS, MAX_STOPS
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.model.weights.folder import GenerationDefaults
from isthmus.serve.prepare.answer import TextOptions
from isthmus.serve.prepare.grammar import Grammars
from isthmus.serve.prepare.request import (
    MAX_TOKENS,
    Preparation,
    detokenized,
    tokenized,
)
from isthmus.serve.prepare.sampling import MAX_STOP_TOKENS
from isthmus.types import MAX_MESSAGES, Conversation, Question, SamplingParams, Service, TextPrompt, TokenPrompt
from tests.model.weights.huggingface.folders import write_tokenizer
from tests.serve.prepare.schemas import small_tokenizer

RECOMMENDED = GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20)
A = TextPrompt("a")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.fixture
def preparation(tokenizer: Tokenizer) -> Preparation:
    chat = ChatTemplate("{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}{{ shout | upper }}")
    return Preparation(tokenizer, chat, RECOMMENDED, 64)


def test_recommended_sampling_fills_what_is_absent(preparation: Preparation, tokenizer: Tokenizer) -> None:
    """A reasoning model at temperature 1 without top_k talks nonsense, and nobody knows why."""
    plain = preparation.request(Question(A)).sampling
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (0.6, 0.95, 20, 0.0)
    asked = preparation.request(Question(A, SamplingParams(temperature=0.0, top_k=0))).sampling
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.0, 0.95, 0)
    nothing = Preparation(tokenizer, None, GenerationDefaults(), 64).request(Question(A)).sampling
    assert (nothing.temperature, nothing.top_p, nothing.top_k) == (1.0, 1.0, 0)


def test_recommended_stops_hold_unless_others_are_asked_for(tokenizer: Tokenizer) -> None:
    """An answer would go on into the next turn, or a benchmark with ignore_eos would end early."""
    preparation = Preparation(tokenizer, None, GenerationDefaults(stop_strings=("User:",)), 64)

    def stops(**sampling: Any) -> tuple[str, ...]:
        options: TextOptions = preparation.request(Question(A, SamplingParams(**sampling))).text_options
        return () if options.stops is None else options.stops.strings

    assert stops() == ("User:",)
    assert stops(stop="b") == ("b",)
    assert stops(stop=["b", "c"], ignore_eos=True) == ("b", "c")
    assert stops(ignore_eos=True) == ()


def test_a_token_without_an_embedding_is_refused(preparation: Preparation, tokenizer: Tokenizer) -> None:
    """Gemma 3's tokenizer spells one more token than the model has: it would read another token's row."""
    (top,) = tokenizer.encode("a")
    tokenizer.vocab_size = top
    with pytest.raises(InvalidRequest, match=f"spells the token {top}"):
        preparation.request(Question(A))


def test_a_prompt_is_cut_to_its_last_tokens(preparation: Preparation, tokenizer: Tokenizer) -> None:
    """A long log would be refused, or its beginning kept and its end, which is asked about, lost."""
    letters = "abcdefgh" * 99
    ids = tokenizer.encode(letters)
    talk = Conversation([{"role": "user", "content": letters}])
    for prompt, tokens in (
        (TextPrompt(letters), ids),
        (TokenPrompt(ids), ids),
        (talk, tokenizer.encode_chat("user" + letters)),
        (TextPrompt("abc"), tokenizer.encode("abc")),
    ):
        for last in (1, 5, 63):
            request = preparation.request(Question(prompt, SamplingParams(truncate_prompt_tokens=last)))
            assert list(request.prompt) == tokens[-last:]
            assert request.max_tokens == 64 - len(request.prompt)


def test_lengths_follow_from_the_context(preparation: Preparation) -> None:
    """Without max_tokens a text must end somewhere, and fit."""
    assert preparation.request(Question(TokenPrompt([1] * 60))).max_tokens == 4
    assert preparation.request(Question(A)).max_tokens == 63
    assert preparation.request(Question(A, SamplingParams(max_tokens=7))).max_tokens == 7


@pytest.mark.parametrize(
    "prompt, sampling, field",
    [
        (TextPrompt(""), {}, "prompt"),
        (TextPrompt("a" * 1000), {}, "prompt"),
        (TokenPrompt([]), {}, "prompt"),
        (TokenPrompt([1] * 64), {}, "prompt"),
        (TokenPrompt([1, 2, 90]), {}, "prompt[2]"),
        (TokenPrompt([1, -1]), {}, "prompt[1]"),
        (TokenPrompt([1 << 70]), {}, "prompt[0]"),
        (Conversation([]), {}, "messages"),
        (Conversation([{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)), {}, "messages"),
        (Conversation([{"role": "user", "content": "a"}, {"content": "a"}]), {}, "messages[1].role"),
        (Conversation([{"role": "user"}]), {}, "messages[0].content"),
        (Conversation([{"role": "user", "contents": "a"}]), {}, "messages[0]"),
        (Conversation([{"role": "user", "content": 3}]), {}, "messages[0].content"),
        (Conversation([{"role": "user", "content": "a"}], {"shout": object()}), {}, "chat_template"),
        (A, {"temperature": math.nan}, "temperature"),
        (A, {"temperature": -1}, "temperature"),
        (A, {"top_p": 0.0}, "top_p"),
        (A, {"min_p": 1.5}, "min_p"),
        (A, {"top_k": -1}, "top_k"),
        (A, {"top_k": 1 << 31}, "top_k"),
        (A, {"seed": -1}, "seed"),
        (A, {"seed": 1 << 64}, "seed"),
        (A, {"stop_token_ids": [0, 90]}, "stop_token_ids[1]"),
        (A, {"stop_token_ids": [0] * (MAX_STOP_TOKENS + 1)}, "stop_token_ids"),
        (A, {"stop": ""}, "stop[0]"),
        (A, {"stop": ["a", "b" * (MAX_STOP_CHARACTERS + 1)]}, "stop[1]"),
        (A, {"stop": ["a"] * (MAX_STOPS + 1)}, "stop"),
        (A, {"stop": ["a", 3]}, "stop[1]"),
        (A, {"stop": b"a"}, "stop"),
        (A, {"stop": None}, "stop"),
        (A, {"include_stop": "no"}, "include_stop"),
        (A, {"skip_special_tokens": "no"}, "skip_special_tokens"),
        (A, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (A, {"truncate_prompt_tokens": 64}, "truncate_prompt_tokens"),
        (TokenPrompt([90, *[1] * 99]), {"truncate_prompt_tokens": 2}, "prompt[0]"),
        (TokenPrompt([1] * (MAX_TOKENS + 1)), {"truncate_prompt_tokens": 2}, "prompt"),
        (TextPrompt("a" * (MAX_TOKENS + 9)), {"truncate_prompt_tokens": 2}, "prompt"),
    ],
)
def test_what_can_not_work_is_named(preparation: Preparation, prompt: Any, sampling: Any, field: str) -> None:
    """A typo costs an afternoon, or a number that fits no word ends the engine."""
    with pytest.raises(InvalidRequest) as refused:
        preparation.request(Question(prompt, SamplingParams(**sampling)))
    assert refused.value.field == field


@pytest.mark.parametrize(
    "text, options, field",
    [
        ("abab", {"response_format": Regex("(ab)+")}, None),
        ("abaa", {"response_format": Regex("(ab)+")}, "resume_token_ids[3]"),
        ("cab", {"response_format": Choices(["ab", "ba"])}, "resume_token_ids[0]"),
        ("ab", {"response_format": Choices(["ab", "ba"])}, "resume_token_ids"),
        ("abab", {"response_format": Choices(["ab", "ba"])}, "resume_token_ids[2]"),
        ("abc", {"stop": "ab"}, None),
        ("abc", {"ends": "b"}, "resume_token_ids[1]"),
        ("a" * 65, {}, "resume_token_ids"),
    ],
)
def test_what_can_not_be_resumed_is_refused_before_it_costs_anything(
    text: str, options: dict[str, Any], field: str | None
) -> None:
    """Text that breaks its form, or that has ended, would fail in the engine, as if that were at fault."""
    tokenizer = small_tokenizer()
    ids = [token for letter in text for token in tokenizer.encode_part(letter)]
    if ends := options.pop("ends", ""):
        options["stop_token_ids"] = tokenizer.encode_part(ends)
    preparation = Preparation(
        tokenizer, None, GenerationDefaults(), 64, Grammars(tokenizer, tokenizer.vocab_size)
    )  # fmt: skip
    question = Question(TokenPrompt([1]), SamplingParams(seed=1, resume_token_ids=ids, **options))
    if field is None:
        assert preparation.request(question).resumed == ids
        return
    with pytest.raises(InvalidRequest) as refused:
        preparation.request(question)
    assert refused.value.field == field


def test_the_end_of_a_text_is_not_resumed(preparation: Preparation, tokenizer: Tokenizer) -> None:
    """Whoever adds the token that ended a text to it would get another text after it."""
    (end,) = tokenizer.eos_ids
    sampling = SamplingParams(seed=1, resume_token_ids=[2, end])
    with pytest.raises(InvalidRequest) as refused:
        preparation.request(Question(A, sampling))
    assert refused.value.field == "resume_token_ids[1]"
    assert preparation.request(Question(A, sampling.replace(ignore_eos=True))).resumed == [2, end]


def test_a_model_without_a_template_says_so(tokenizer: Tokenizer) -> None:
    """A base model would be asked in some form that nobody chose."""
    with pytest.raises(InvalidRequest, match="no chat template"):
        Preparation(tokenizer, None, RECOMMENDED, 64).request(Question(Conversation([{"role": "user"}])))


def test_a_text_for_its_own_sake(tokenizer: Tokenizer) -> None:
    """Both directions name what is wrong."""
    assert detokenized(tokenizer, tokenized(tokenizer, "abc")) == "abc"
    for call, field in (
        (lambda: tokenized(tokenizer, ""), "text"),
        (lambda: detokenized(tokenizer, [1, -2]), "token_ids[1]"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            call()
        assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "priority": (101, -101, 1.5, True, "1"),
        "max_queue_time": (0, -1.0, math.nan, math.inf, "1"),
        "cache": ("none", "", None, True, ["on"]),
        "cache_salt": ("x" * 257, "\ud800", b"salt", None),
    }.items(),
)
def test_how_a_request_is_served_is_checked_by_name(
    preparation: Preparation, field: str, values: tuple[Any, ...]
) -> None:
    """What is taken silently and does nothing is found out under load, when it matters."""
    for value in values:
        with pytest.raises(InvalidRequest) as failure:
            preparation.request(Question(A, service=Service(**{field: value})))
        assert failure.value.field == field


def test_how_a_request_is_served_reaches_the_engine(preparation: Preparation) -> None:
    """Each of them is somebody's way to say what the request is worth."""
    plain = preparation.request(Question(A))
    assert (plain.tenant, plain.priority, plain.deadline, plain.max_queue_time) == ("", 0, None, None)
    assert plain.cache_read and plain.cache_write
    asked = Service(priority=-100, max_queue_time=2, cache="read", cache_salt="s")
    request = preparation.request(Question(A, service=asked), tenant="t", deadline=9.0)
    assert (request.tenant, request.priority, request.deadline, request.max_queue_time) == ("t", -100, 9.0, 2.0)
    assert (request.cache_read, request.cache_write) == (True, False)
    off = preparation.request(Question(A, service=Service(cache="off")))
    assert not off.cache_read and not off.cache_write


def test_no_salt_leads_to_another_tenants_pages(preparation: Preparation) -> None:
    """Whoever guesses another's salt, or takes its name for one, would learn of its prompts by their speed."""
    asked = [(tenant, salt) for tenant in ("", "a", "as", "b") for salt in ("", "s", "a", "as")]
    salts = {
        preparation.request(Question(A, service=Service(cache_salt=salt)), tenant=tenant).cache_salt
        for tenant, salt in asked
    }
    assert len(salts) == len(asked)
