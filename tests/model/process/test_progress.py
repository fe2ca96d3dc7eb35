"""What is said of long work where nobody watches a terminal: a log must show that it goes on, and how far it is."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from isthmus.model.process import progress
from isthmus.model.process.progress import stages, working
from tests.serve.api.harness import wait_for


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    return Console(file=io.StringIO(), soft_wrap=True)


def lines(console: Console) -> list[str]:
    return [re.sub(r" \(\d+ s\)$", "", line) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_work_without_an_amount_says_what_goes_on(log: Console) -> None:
    with working(log, "loading") as show:
        wait_for(lambda: "loading" in lines(log), "a line")
        show("compiled 3/40 programs")
        wait_for(lambda: "compiled 3/40 programs" in lines(log), "another one")
    assert set(lines(log)) == {"loading", "compiled 3/40 programs"}


def test_work_with_an_amount_says_how_far_it_is(log: Console) -> None:
    with stages(log) as shown:
        reading = shown.begin("reading", 2.5e9)
        reading.advance(1.25e9)
        wait_for(lambda: "reading: 1.25 of 2.50 GB" in lines(log), "a line")
        comparing = shown.begin("comparing", 24, "windows")
        comparing.advance()
        wait_for(lambda: "comparing: 1 of 24 windows" in lines(log), "a line of the next stage")
        unknown = shown.begin("quantizing", None)
        unknown.advance(1e9)
        wait_for(lambda: "quantizing: 1.00 GB" in lines(log), "a line without a total")
        unknown.finish()
        wait_for(lambda: "quantizing: 1.00 of 1.00 GB" in lines(log), "its end")
        shown.say("writing 2 GB")
        wait_for(lambda: "writing 2 GB" in lines(log), "a stage that tells nothing")


def test_short_work_says_nothing() -> None:
    console = Console(file=io.StringIO())
    with working(console, "loading"), stages(console) as shown:
        shown.begin("reading", 1).finish()
    assert lines(console) == []
