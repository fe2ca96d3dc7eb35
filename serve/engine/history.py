"""What tenants' earlier texts were, so that a text which comes again is foretold (SuffixDecoding, Oliaro et al. 2024,
arXiv 2411.04975).

That work keeps a suffix tree of bounded depth with counts. What it is asked for is where the longest end of a sequence
was before, and what followed there most often. Here those places are found as a compressor finds them (LZ77, Ziv and
Lempel 1977; hash chains as in zlib): a table leads from a hash of the last 24, 12, 6 and 3 tokens to the latest places
that such tokens end at, and whoever guesses counts what follows at them. So the end that is found is more than half as
long as the longest one, or at least 24 tokens, and counts are of the latest places, where a tree has all ends and all
counts. But a token takes 4 entries of fixed arrays, not a node for each of its depths, nothing is ever deleted from a
table, and forgetting the oldest texts is giving one object back.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence as Tokens
from itertools import chain
from typing import NamedTuple
from zlib import crc32

from isthmus.serve.engine.messages import End, Ending, Request

LENGTHS = (3, 6, 12, 24)
"""How many tokens places are found by"""
MOST_PLACES = 8
"""Latest places that are found, of each length"""
MOST_PROBES = 4 * MOST_PLACES
"""Places that are looked at for them: some have the same hash only"""
NO_TOKEN = -1
"""Ends a text: no sequence holds it"""
MOST_INDEXED = 64
"""Tokens of earlier texts that are indexed for a sequence in a step; each takes a few microseconds"""
TENANT_SHARE = 8
"""The texts of one tenant, salt and adapter hold at most this part of all tokens"""
_SMALLEST = 1 << 8
"""Tokens of the first window of a history, which is counted as so many at least"""


class Window:
    """Texts, end to end, and where each of their tokens has come: 36 to 52 bytes for each token of its capacity."""

    def __init__(self, capacity: int) -> None:
        """capacity: the most tokens, with one for the end of each text."""
        self.capacity = capacity
        self.tokens = array("i")
        entries = capacity * len(LENGTHS)
        self._mask = (1 << entries.bit_length()) - 1
        self._latest = array("i", bytes(4 * (self._mask + 1)))
        """By the hash of tokens, the newest entry, counted from 1; 0 is none. Entry len(LENGTHS) * index + n stands for
        as many tokens as LENGTHS[n] that end with the one at `index`"""
        self._before = array("i", bytes(4 * entries))
        """By entry, the one before it with that hash"""

    def append(self, token: int, length: int) -> None:
        """Adds a token. length: how many tokens before the next one belong to its text, if what comes next is to be
        found; 0 where it isn't."""
        tokens, mask, latest = self.tokens, self._mask, self._latest
        entry = len(tokens) * len(LENGTHS)
        tokens.append(token)
        length = min(length, len(tokens))
        for size in LENGTHS:
            if length < size:
                return
            slot = crc32(tokens[-size:]) & mask
            self._before[entry] = latest[slot]
            entry += 1
            latest[slot] = entry

    def places(self, n: int, tokens: array[int]) -> list[int]:
        """The latest indices behind these tokens, of which there are LENGTHS[n], where something follows."""
        entry = self._latest[crc32(tokens) & self._mask]
        if not entry:
            return []
        found, held, size = [], self.tokens, len(tokens)
        for _ in range(MOST_PROBES):
            index, kind = divmod(entry - 1, len(LENGTHS))
            if kind == n and held[index + 1 - size : index + 1] == tokens and self.follows(index + 1):
                found.append(index + 1)
            entry = self._before[entry - 1]
            if not entry or len(found) == MOST_PLACES:
                break
        return found

    def follows(self, index: int) -> bool:
        """Whether a text goes on at `index`."""
        return index < len(self.tokens) and self.tokens[index] != NO_TOKEN


class Place(NamedTuple):
    """Where an earlier text goes on as a sequence may."""

    window: Window
    at: int

    @property
    def token(self) -> int:
        """What follows there; NO_TOKEN where nothing does."""
        tokens = self.window.tokens
        return tokens[self.at] if self.at < len(tokens) else NO_TOKEN

    @property
    def next(self) -> Place:
        return Place(self.window, self.at + 1)


class _Text(NamedTuple):
    tokens: array[int]
    begins: int
    """How many of them come before the first that is to be foretold"""

    def length(self, at: int) -> int:
        """How many of its tokens lead to the one after `at`; 0 if that isn't to be foretold."""
        return at + 1 if self.begins <= at + 1 < len(self.tokens) - 1 else 0


class History:
    """The latest texts of one tenant, salt and adapter: in a few windows, each larger than the one before it up to half
    of all, and those that aren't indexed yet, because no sequence has asked since. The oldest window is forgotten
    first."""

    def __init__(self, most: int) -> None:
        """most: tokens that it may hold."""
        self._most = most
        self._windows: list[Window] = []
        """The newest first"""
        self._waiting: deque[_Text] = deque()
        self._left = 0
        """Tokens of waiting texts that are still to be indexed"""
        self._begun = 0
        """Tokens of the first waiting text that are indexed"""
        self.counted = 0
        """Tokens that it counts as among all histories"""

    @property
    def held(self) -> int:
        """Tokens that it holds, with one for the end of each text."""
        return self._left + sum(len(window.tokens) for window in self._windows)

    def add(self, context: Tokens[int], text: Tokens[int]) -> None:
        """Takes in a text, and the tokens that it came behind. Of a text that fills the half it takes the beginning."""
        tokens = array("i", chain(context, text))[: self._most // 2 - 1]
        tokens.append(NO_TOKEN)
        self._waiting.append(_Text(tokens, len(context)))
        self._left += len(tokens)
        self._trim()

    def index(self, most: int) -> None:
        """Makes up to `most` more tokens of waiting texts known."""
        while self._waiting and most > 0:
            text, first, window = self._waiting[0], self._begun, self._window()
            room = window.capacity - len(window.tokens)
            last = min(first + most, len(text.tokens), first + room)
            for at in range(first, last):
                window.append(text.tokens[at], text.length(at))
            self._begun, self._left, most = last, self._left - (last - first), most - (last - first)
            if last == len(text.tokens):
                self._waiting.popleft()
                self._begun = 0

    def find(self, tokens: Tokens[int]) -> tuple[int, list[Place]]:
        """The latest places that go on behind the end of `tokens`, the newest first, and how long that end is; 0 and
        none if 3 tokens were never there."""
        end = array("i", tokens[-LENGTHS[-1] :])
        found: tuple[int, list[Place]] = 0, []
        for n, size in enumerate(LENGTHS):
            if len(end) < size:
                break
            last = end[-size:]
            places = [Place(window, at) for window in self._windows for at in window.places(n, last)]
            if not places:  # no longer end was there either
                break
            found = size, places[:MOST_PLACES]
        return found

    def _window(self) -> Window:
        """The window that the next token goes into. A new one begins with the end of what is indexed of the text, so
        that what comes next is found by it."""
        if not self._windows or len(self._windows[0].tokens) == self._windows[0].capacity:
            wanted = 4 * self._windows[0].capacity if self._windows else _SMALLEST
            made = Window(max(1, min(wanted, self._most // 2)))
            text, begun = self._waiting[0], self._begun
            for at in range(max(0, begun - min(LENGTHS[-1], made.capacity // 2)), begun):
                made.append(text.tokens[at], text.length(at) if at + 1 == begun else 0)
            self._windows.insert(0, made)
            self._trim()
        return self._windows[0]

    def _trim(self) -> None:
        """Forgets the oldest, but not what comes next, until there is room."""
        while self.held > self._most:
            if len(self._windows) > 1 or (self._windows and self._waiting and not self._begun):
                self._windows.pop()
            else:
                text = self._waiting.popleft()
                self._left -= len(text.tokens) - self._begun
                self._begun = 0


class Histories:
    """The histories of all tenants. Whose was used longest ago is forgotten first."""

    def __init__(self, most: int) -> None:
        """most: tokens that all of them may hold."""
        self._most = most
        self._of: OrderedDict[tuple[str, bytes, bytes], History] = OrderedDict()
        self.held = 0
        """Tokens that all of them hold, at most"""

    def of(self, request: Request) -> History | None:
        """What a request may know of earlier texts; None if there is nothing, or it may not read."""
        owner = _owner(request)
        if not request.cache_read or owner not in self._of:
            return None
        self._of.move_to_end(owner)
        return self._of[owner]

    def add(self, request: Request, end: End) -> None:
        """Keeps what a request has got, if it may be kept."""
        if not request.cache_write or not end.tokens or end.reason is Ending.ERROR:
            return
        owner = _owner(request)
        history = self._of.setdefault(owner, History(max(2, self._most // TENANT_SHARE)))
        self._of.move_to_end(owner)
        longest = LENGTHS[-1]
        history.add((*request.prompt[-longest:], *request.resumed[-longest:])[-longest:], end.tokens)
        self.held -= history.counted
        history.counted = max(history.held + 2 * longest, _SMALLEST)  # a window begins with so many twice
        self.held += history.counted
        while self.held > self._most and self._of:
            _, oldest = self._of.popitem(last=False)
            self.held -= oldest.counted


def _owner(request: Request) -> tuple[str, bytes, bytes]:
    """Requests know of each other's texts only if all of it is equal, as of each other's pages (prefix.py)."""
    return request.tenant, request.cache_salt, b"" if request.adapter is None else request.adapter.key
