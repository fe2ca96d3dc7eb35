"""What a reader gets is the same however the tokens come: one by one, or many at once because the reader is slow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import Cancelled
from isthmus.model.text.stops import StopStrings
from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.messages import End, Ending, Event, Logprobs, Progress, Request
from isthmus.serve.engine.sampling import Sampling
from isthmus.serve.prepare.answer import Answer, TextOptions
from isthmus.types import Completion, Delta, FinishReason
from tests.model.text.test_stops import first_stop
from tests.model.text.tokenizers import KINDS

NAMES = ("byte_level", "llama2", "wordpiece")
"""Bytes that are joined, bytes whose runs are held until they end, and neither"""
TOKENIZERS = {name: Tokenizer(KINDS[name]()) for name in NAMES}
EOS = 2
STOPS = st.lists(
    st.sampled_from(["é", "漢", "a", "ab", " a", "ba", "b !", "漢a", "\ufffd", "aaa"]), min_size=1, max_size=3
)


def request_of(prompt: list[int], stops: list[str], *, include: bool = False) -> Request:
    options = TextOptions(StopStrings(stops) if stops else None, include, logprobs=0)
    return Request("r", prompt, Sampling(logprobs=0), 99, text_options=options, arrival=0.0)


def events_of(request: Request, ids: list[int], ending: Ending) -> list[Event]:
    """An event a token, at 1, 2, … seconds; the last one ends the request."""
    told = [Logprobs(-float(index), (), ()) for index in range(len(ids))]
    events = [
        Event(request, (token,), (told[index],), progress=Progress(1.0 + index, 0.5, 1.0, preemptions=index))
        for index, token in enumerate(ids)
    ]
    last = events[-1]
    return [*events[:-1], dataclasses.replace(last, end=End(ending, tuple(ids), tuple(told), progress=last.progress))]


def read(tokenizer: Tokenizer, events: list[Event], cuts: list[int]) -> Iterator[Delta]:
    """The deltas up to the completion, of as many events at a time as `cuts` says."""
    answer = Answer(tokenizer, events[0].request)
    for start, end in pairwise(sorted({0, len(events), *(cut % len(events) for cut in cuts)})):
        yield (delta := answer.take(events[start:end]))
        if delta.completion is not None:
            return


def wanted(tokenizer: Tokenizer, request: Request, ids: list[int], stops: list[str], include: bool) -> Any:
    """(text, number of tokens, stop) by searching the whole text anew after each token."""
    stream, text = tokenizer.stream(request.prompt), ""
    for count, token in enumerate(ids, 1):
        text += stream.push([token])
        if found := first_stop(text, stops, include=include):
            return found[0], count, found[1]
    text += stream.flush()
    if found := first_stop(text, stops, include=include):
        return found[0], len(ids), found[1]
    return text, len(ids), None


@pytest.mark.parametrize("name", NAMES)
def test_stops_are_those_of_the_whole_text_however_tokens_come(name: str) -> None:
    """What a slow client reads would go past the stop, or end elsewhere than what a fast one reads."""
    tokenizer = TOKENIZERS[name]
    texts = st.text("ab !é漢😀\ufffd", max_size=4).map(lambda text: tokenizer.encode(text)[1:])
    anything = st.lists(st.integers(3, tokenizer.vocab_size - 1), max_size=4)
    tokens = st.lists(st.one_of(texts, anything), max_size=6).map(lambda parts: [t for part in parts for t in part])
    kinds = dict.fromkeys((None, True), 0)

    @settings(max_examples=300)
    @given(tokens, tokens, STOPS, st.booleans(), st.lists(st.integers(0, 99), max_size=3), st.booleans())
    def check(prompt: list[int], ids: list[int], stops: list[str], include: bool, cuts: list[int], eos: bool) -> None:
        request = request_of(prompt, stops, include=include)
        events = events_of(request, [*ids, EOS if eos else 5], Ending.EOS if eos else Ending.LENGTH)
        ids = ids if eos else [*ids, 5]
        text, count, stop = wanted(tokenizer, request, ids, stops, include)
        deltas = list(read(tokenizer, events, cuts))
        got = deltas[-1].completion
        assert got is not None and (got.text, got.token_ids, got.stop_string) == (text, tuple(ids[:count]), stop)
        assert "".join(delta.text for delta in deltas) == text
        assert tuple(token for delta in deltas for token in delta.token_ids) == got.token_ids
        assert got.logprobs is not None and [told.logprob for told in got.logprobs] == [-float(i) for i in range(count)]
        assert got == list(read(tokenizer, events, list(range(len(events)))))[-1].completion
        assert got.finish_reason == ("STOP_STRING" if stop else "EOS" if eos else "LENGTH")
        assert got.completion_tokens == count + (eos and not stop)
        kinds[stop and True] += 1

    check()
    assert min(kinds.values()) > 25


def stopped_at(events: list[Event], cuts: list[int]) -> Completion:
    completion = list(read(TOKENIZERS["byte_level"], events, cuts))[-1].completion
    assert completion is not None and completion.finish_reason is FinishReason.STOP_STRING
    return completion


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3, 4]])
def test_what_came_after_a_stop_is_not_counted(cuts: list[int]) -> None:
    """The engine draws on until it hears of the stop: tokens, seconds and an error that nobody needed."""
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("abc!!")[1:]
    events = events_of(request_of([1], ["b"]), ids, Ending.CANCELLED)
    done = stopped_at(events, cuts)
    assert (done.text, done.token_ids, done.stop_string) == ("a", tuple(ids[:2]), "b")
    assert (done.completion_tokens, done.total_seconds, done.preemptions, done.stop_token_id) == (2, 2.0, 1, None)
    assert (done.queue_seconds, done.time_to_first_token) == (0.5, 1.0)
    with pytest.raises(Cancelled):
        list(read(tokenizer, events_of(request_of([1], ["z"]), ids, Ending.CANCELLED), cuts))


def test_a_stop_that_the_prompt_begins_is_none() -> None:
    """A prompt that ends in a newline would end at the answer's first."""
    tokenizer = TOKENIZERS["byte_level"]
    prompt, ids = tokenizer.encode("!a"), tokenizer.encode("ba")[1:]
    events = events_of(request_of(prompt, ["ab", "a!"]), ids, Ending.LENGTH)
    assert [delta.text for delta in read(tokenizer, events, [1])] == ["b", "a"]


def test_an_answer_without_text_ends_at_its_stop_all_the_same() -> None:
    """Who asks for token ids alone would get all of max_tokens."""
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a!b")[1:]
    events = events_of(request_of([1], ["!"]), ids, Ending.LENGTH)
    done = Answer(tokenizer, events[0].request, with_text=False).take(events).completion
    assert done is not None and (done.text, done.token_ids) == ("", tuple(ids[:2]))
