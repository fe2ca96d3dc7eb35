"""Earlier texts foretell what comes again: to whoever asked for them, and to nobody else."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from isthmus.serve.engine import drafts
from isthmus.serve.engine.adapters import KEY_BYTES, Resident
from isthmus.serve.engine.drafts import GRAM, MOST_GUESSES, PATIENCE, Guesser, Lookup, Recall
from isthmus.serve.engine.history import LENGTHS, MOST_PLACES, TENANT_SHARE, Histories, History
from isthmus.serve.engine.messages import End, Ending, Request
from isthmus.serve.engine.sampling import Sampling

ALL = 1 << 30
REQUEST = Request("r", [1, 2, 3], Sampling(), 8, tenant="a", cache_salt=b"s")


def history_of(*texts: list[int], most: int = 1 << 14) -> History:
    made = History(most)
    for text in texts:
        made.add((), text)
    made.index(ALL)
    return made


def longest_end(texts: list[list[int]], tokens: list[int]) -> int:
    """How many of the last tokens were somewhere before, with something behind them."""
    ends = [text[:at] for text in texts for at in range(1, len(text))]
    most = 0
    for before in ends:
        length = 0
        while length < min(len(before), len(tokens)) and before[-1 - length] == tokens[-1 - length]:
            length += 1
        most = max(most, length)
    return most


@pytest.mark.parametrize("seed", range(6))
def test_what_is_found_is_more_than_half_of_the_longest_end(seed: int) -> None:
    """A shorter end is a worse guess: of a question's answers, not of this question's."""
    rng = random.Random(seed)
    texts = [[rng.randrange(9) for _ in range(rng.randrange(1, 120))] for _ in range(12)]
    history = history_of(*texts)
    for _ in range(60):
        text = rng.choice(texts)
        at = rng.randrange(len(text) + 1)
        tokens = [rng.randrange(9) for _ in range(rng.randrange(30))] + text[max(0, at - rng.randrange(40)) : at]
        found, places = history.find(tokens)
        longest = longest_end(texts, tokens)
        assert found in (0, *LENGTHS) and len(places) <= MOST_PLACES and bool(places) == (found > 0)
        assert found == max((length for length in (0, *LENGTHS) if length <= longest), default=0)
        for window, end in places:
            assert list(window.tokens[end - found : end]) == tokens[len(tokens) - found :]
        assert all(one.at > other.at for one, other in pairwise(places) if one.window is other.window), "newest first"


def test_what_followed_most_often_is_guessed() -> None:
    """And nothing where the texts don't agree: a slot of a template costs no rows."""
    common, ends = list(range(100, 112)), [[1, 2, 3, 4], [1, 2, 7, 8], [5, 2, 7, 8], [1, 9, 7, 8]]
    recall = Recall(history_of(*[common + end for end in ends]))
    assert recall.follow([0, *common]) and recall.guess(9) == (1, 2)
    assert recall.follow([0, *common, 1, 9]) and recall.guess(9) == (7, 8), "those that went on so are left"
    assert not recall.follow([0, *common, 1, 9, 7, 8]), "all have ended"
    assert not Recall(history_of(*[[*common, n, n] for n in range(5)])).follow(common)


def test_a_short_agreement_must_last_and_a_wrong_guess_makes_it_longer() -> None:
    """Three tokens agree by chance: a guess after each of them would slow down every text."""
    text = list(range(200, 260))
    recall, needed = Recall(history_of(text)), GRAM + PATIENCE
    assert not any(recall.follow([1, 2, *text[:known]]) for known in range(1, 6))
    assert recall.follow([1, 2, *text[:needed]]) and recall.guess(99) == tuple(text[needed : needed + MOST_GUESSES])
    recall.learn(7, 0)
    known = next(known for known in range(needed, 60) if recall.follow([1, 2, *text[:known]]))
    assert known == 2 * needed and len(recall.guess(99)) == 1
    recall.learn(1, 1)
    assert recall.guess(99) == tuple(text[known : known + MOST_GUESSES])


def test_its_own_text_comes_first() -> None:
    """What a sequence repeats of itself is nearer than what another said."""
    own, other = [*range(30), *range(12)], [*range(12), 99, 98, 97]
    guesser = Guesser(Lookup(), history_of(other))
    assert guesser.follow(own) and guesser.guess(3) == (12, 13, 14) and not guesser.recalls
    fresh = Guesser(Lookup(), history_of(other))
    assert fresh.follow([7, 7, *range(12)]) and fresh.guess(3) == (99, 98, 97) and fresh.recalls


def test_a_step_indexes_a_bounded_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of a busy hour, all at once, would hold up the first quiet step."""
    monkeypatch.setattr(drafts.history, "MOST_INDEXED", 10)
    text = list(range(25))
    made = History(1 << 14)
    made.add((), text)
    recall = Recall(made)
    seen = []
    for _ in range(3):
        recall.follow(text[:24])
        seen.append(sum(len(window.tokens) for window in made._windows))
    assert seen == [10, 20, 26]
    assert recall.follow([*text[:12]]) and recall.guess(2) == (12, 13)


def test_of_a_prompt_only_its_end_leads_to_the_answer() -> None:
    """Prompts would fill the memory of answers, and are foretold by nobody."""
    made = Histories(1 << 16)
    request = replace(REQUEST, prompt=list(range(500)))
    made.add(request, End(Ending.EOS, (900, 901, 902)))
    found = made.of(request)
    assert found is not None and found.held == LENGTHS[-1] + 4
    found.index(ALL)
    assert found.find(list(range(490)))[0] == 0
    length, places = found.find(list(range(500)))
    assert length == LENGTHS[-1] and [place.token for place in places] == [900]


@pytest.mark.parametrize("most", [64, 4096])
def test_memory_is_bounded_in_total_and_for_each(most: int) -> None:
    """One that talks for ever must neither fill the memory nor push out all others."""
    rng = random.Random(0)
    made = Histories(most)
    for step in range(400):
        request = replace(REQUEST, tenant=str(rng.randrange(40)), prompt=[rng.randrange(9)] * rng.randrange(1, 40))
        made.add(request, End(Ending.LENGTH, tuple(rng.randrange(9) for _ in range(rng.randrange(1, 1000)))))
        one = made.of(request)
        if one is not None and step % 3:
            one.index(rng.randrange(2000))
        real = [
            sum(len(window.tokens) for window in each._windows)
            + sum(len(text.tokens) for text in each._waiting)
            - each._begun
            for each in made._of.values()
        ]
        assert sum(real) <= made.held <= most
        for each, tokens in zip(made._of.values(), real, strict=True):
            assert tokens == each.held <= max(2, most // TENANT_SHARE)


def test_the_one_that_was_used_longest_ago_is_forgotten() -> None:
    made = Histories(1024)
    owners = [replace(REQUEST, cache_salt=bytes([n])) for n in range(5)]
    for request in owners[:4]:
        made.add(request, End(Ending.EOS, (1, 2, 3)))
    assert made.of(owners[0]) is not None, "used again"
    made.add(owners[4], End(Ending.EOS, (1, 2, 3)))
    assert [made.of(request) is not None for request in owners] == [True, False, True, True, True]


def test_the_newest_texts_of_one_are_kept() -> None:
    """Whoever has filled his part goes on with what he says now."""
    made = History(1000)
    for n in range(200):
        made.add((), [1000 * n + at for at in range(20)])
        made.index(ALL)
    kept = [made.find([1000 * n + at for at in range(10)])[0] > 0 for n in range(200)]
    assert not any(kept[:150]) and all(kept[-20:])


OTHERS = {
    "tenant": replace(REQUEST, tenant="b"),
    "salt": replace(REQUEST, cache_salt=b"t"),
    "adapter": replace(REQUEST, adapter=Resident("x", 1, bytes(KEY_BYTES))),
    "bypass": replace(REQUEST, cache_read=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_texts_of_others_are_not_there(name: str) -> None:
    """A guess that comes true makes a step faster: who sees that of another's text, reads it."""
    made = Histories(1 << 16)
    made.add(REQUEST, End(Ending.EOS, (7, 8, 9)))
    assert made.of(OTHERS[name]) is None and made.of(REQUEST) is not None


def test_what_must_not_be_written_is_not() -> None:
    made = Histories(1 << 16)
    made.add(replace(REQUEST, cache_write=False), End(Ending.EOS, (7, 8, 9)))
    made.add(REQUEST, End(Ending.ERROR, (7, 8, 9)))
    made.add(REQUEST, End(Ending.EMBEDDED))
    assert made.of(REQUEST) is None and made.held == 0
