"""Other people's regular expressions are matched in bounded time, or refused."""

from __future__ import annotations

import pytest

from isthmus.model.weights.patterns import Matching, check_pattern, compiled, is_common

FINE = [
    ".*q_proj",
    ".*self_attn.*",
    r"model\.layers\.\d+\.mlp\..*",
    ".*(q|k|v)_proj$",
    ".*mlp.(gate|up|down)_proj.*",
    ".*lm_head",
    r".*layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj",
    "^(?!visual).*",
    ".*attention/value/.*",
    "blocks/(0|1|2|3)/(mlp/up/kernel|mlp/down/kernel)",
    "embedding|head",
    ".*/mlp/down/kernel|.*/attention/value/kernel|embedding|head|.*/attention/key/kernel|.*/attention/out/kernel",
    ".*mlp/(up|gate)/.*",
    "(ab|cd)*",
    "blocks/1?[0-9]/.*",
    "",
]

REFUSED = {
    "(.*)*(.*)*(.*)*X": "has 6 quantifiers",
    "(.*)*X": "over a group",
    "(a+)+X": "over a group",
    "(?:a|aa)*X": "over a group",
    "(a?){50}X": "over a group",
    "((a{1,9}){1,9}){1,9}X": "over a group",
    "(?=.*)*X": "over a group",
    "(){1000000000}": "over a group",
    "(.*|b)+X": "over a group",
    "(?>(a*))*X": "over a group",
    "(x)?(?(1)(a*)*|b)X": "over a group",
    "(.*)(.*)(.*)(.*)X": "has 4 quantifiers",
    "a?" * 30 + "a" * 30: "too many ways",
    "a{0,90}" * 5: "too many ways",
    "(a|aa)" * 30: "too many ways",
    "x" * 201: "longer than 200",
    "(": "is no regular expression",
    "a{99999999999}": "is no regular expression",
    "(?<=.*)x": "is no regular expression",
}


@pytest.mark.parametrize("pattern", FINE)
def test_patterns_that_people_write_are_accepted(pattern: str) -> None:
    assert check_pattern(pattern) is None


@pytest.mark.parametrize("pattern", REFUSED)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    """Each of them, but for the last four, goes through more than millions of ways to fail at one name."""
    assert REFUSED[pattern] in (check_pattern(pattern) or "")


@pytest.mark.parametrize("end", ["(?=Q)", r"(?<=\d)", "(?!)", r"\d", ""])
def test_what_takes_re_hours_is_matched_at_once(end: str) -> None:
    """Of `re`, each of the names takes seconds, in which no other thread of the process runs."""
    pattern = compiled(".?" * 10 + ".*" * 6 + end)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(1000)]
    assert {Matching().is_whole(pattern, name) for name in names} == {end == ""}


def test_matching_ends_when_its_time_is_over() -> None:
    matching = Matching(0)
    for match in (matching.is_whole, matching.begins):
        with pytest.raises(TimeoutError):
            match(compiled(".*"), "a")


def test_the_beginning_is_not_the_whole() -> None:
    pattern, matching = compiled("a|ab"), Matching()
    assert (
        matching.begins(pattern, "abc") and not matching.is_whole(pattern, "abc") and matching.is_whole(pattern, "ab")
    )
    assert not matching.begins(pattern, "ba")


@pytest.mark.parametrize("pattern", ["(q){e<=1}", "[[:alpha:]]+", "[[.a.]]", r"\{", "a{x}"])
def test_what_only_one_of_both_knows_is_seen(pattern: str) -> None:
    """What it means to PEFT, which asks `re`, would be another thing to us."""
    assert not is_common(pattern)


def test_what_people_write_means_the_same_to_both() -> None:
    assert all(map(is_common, FINE)) and is_common("a{2}b{2,}c{,3}d{1,3}")
