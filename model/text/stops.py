"""Finds the first of several strings in a text that comes in pieces, wherever the pieces are cut, in time linear in the
text (Aho and Corasick, "Efficient string matching", 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MAX_STOPS = 16
"""Most strings that can end a text"""
MAX_STOP_CHARACTERS = 256
"""Most characters of each"""


class StopStrings:
    """Strings that end a text. Immutable once made: any number of searches may use it at once."""

    def __init__(self, strings: Sequence[str]) -> None:
        """strings: none of them empty. It takes time linear in their characters, which are a tree's nodes here."""
        self.strings = tuple(strings)
        self.next: list[dict[str, int]] = [{}]
        """For each node the nodes that follow it, by character; node 0 is the root"""
        self.depth = [0]
        """Characters from the root to each node"""
        self.longest_suffix = [0]
        """The node of the longest other suffix of a node's characters that has a node"""
        self.ending: list[str | None] = [None]
        """The longest of the strings that a node's characters end in"""
        for string in self.strings:
            self._add(string)
        self._link()

    def search(self, *, include: bool = False) -> StopSearch:
        """A search in one text. include: whether the string that is found is given out as well."""
        return StopSearch(self, include)

    def _add(self, string: str) -> None:
        node = 0
        for character in string:
            if character not in self.next[node]:
                self.next[node][character] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[node] + 1)
                self.longest_suffix.append(0)
                self.ending.append(None)
            node = self.next[node][character]
        self.ending[node] = string

    def _link(self) -> None:
        waiting = deque(self.next[0].values())
        while waiting:
            node = waiting.popleft()
            suffix = self.longest_suffix[node]
            self.ending[node] = self.ending[node] or self.ending[suffix]
            for character, child in self.next[node].items():
                self.longest_suffix[child] = self.step(suffix, character)
                waiting.append(child)

    def step(self, node: int, character: str) -> int:
        """The node of the longest suffix of `node`'s characters and `character` that has one."""
        while node and character not in self.next[node]:
            node = self.longest_suffix[node]
        return self.next[node].get(character, 0)


class StopSearch:
    """A text as it comes, up to the first stop string: the one that ends first, and of those that end at the same
    character the longest. What may still become one is held back, at most the longest string without its last
    character."""

    def __init__(self, stops: StopStrings, include: bool) -> None:
        self.found: str | None = None
        """The string that was found, after which nothing must be pushed"""
        self._stops, self._include = stops, include
        self._node, self._held = 0, ""

    def push(self, text: str) -> str:
        """What `text` lets out."""
        stops, node = self._stops, self._node
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            node = stops.step(node, character)
            if (found := stops.ending[node]) is not None:
                self.found, self._held = found, ""
                return whole[: end if self._include else end - len(found)]
        self._node = node
        out = len(whole) - stops.depth[node]
        self._held = whole[out:]
        return whole[:out]

    def flush(self) -> str:
        """What is held back when the text ends without a stop."""
        held, self._held, self._node = self._held, "", 0
        return held
