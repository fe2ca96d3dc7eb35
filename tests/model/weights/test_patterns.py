"""Other people's regular expressions are matched in bounded time, or refused."""

from __future__ import annotations

import pytest

from isthmus.model.weights.patterns import check_pattern

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
}


@pytest.mark.parametrize("pattern", FINE)
def test_patterns_that_people_write_are_accepted(pattern: str) -> None:
    assert check_pattern(pattern) is None


@pytest.mark.parametrize("pattern", REFUSED)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    """Each of them, but for the last three, goes through more than millions of ways to fail at one name."""
    assert REFUSED[pattern] in (check_pattern(pattern) or "")
