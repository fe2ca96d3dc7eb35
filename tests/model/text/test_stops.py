"""Stop strings are found where a plain search in the whole text finds them, however the text is cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model.text.stops import StopStrings

STOPS = st.lists(st.text("ab漢", min_size=1, max_size=5), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str], *, include: bool) -> tuple[str, str] | None:
    """The text up to the stop that ends first, the longest of those that end there, and that stop; None without one."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, start, stop = min(found)
    return text[: end if include else start], stop


def may_become_a_stop(text: str, stops: list[str]) -> int:
    """How many characters at the end of a text begin a stop."""
    return max(size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size]))


@settings(max_examples=1000)
@given(st.lists(st.text("ab漢c", max_size=6), max_size=8), STOPS, st.booleans())
def test_they_are_found_wherever_the_text_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    """A stop that two tokens share would be missed, or its first half shown. And only what may still become one may
    be held back: else a stream seems to hang."""
    search = StopStrings(stops).search(include=include)
    shown, whole = "", ""
    for piece in pieces:
        shown, whole = shown + search.push(piece), whole + piece
        if search.found is not None:
            break
        assert shown == whole[: len(whole) - may_become_a_stop(whole, stops)]
    else:
        shown += search.flush()
    wanted = first_stop(whole, stops, include=include)
    assert (shown, search.found) == (wanted or (whole, None))


def test_a_hostile_stop_takes_no_longer_than_another() -> None:
    """A text of one letter, and stops that nearly match everywhere: 10^8 comparisons if each place began anew."""
    stops, text = StopStrings(["a" * size + "b" for size in range(240, 256)]), "a" * 400_000
    search = stops.search()
    assert search.push(text) + search.push("b") == text[:-255]
    assert search.found == "a" * 255 + "b"
